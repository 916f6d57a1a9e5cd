// What may be compiled for the host and for the device. Plain C.
#ifndef WORKER_ORCD_HOST_DEVICE_H
#define WORKER_ORCD_HOST_DEVICE_H

// In front of a function that both sides use; a free function is also `static`.
#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

#endif
