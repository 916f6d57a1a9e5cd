// A CUDA driver for tests on machines without one: device memory is host memory, each stream is a thread that runs its
// work later than it was queued, and kernels are the few named below. It is strict where a real driver is undefined:
// a copy outside an allocation poisons the context. Enough of the driver for worker_orcd._driver and _upload.
//
// Environment: FAKE_CUDA_DEVICES (1), FAKE_CUDA_CAPABILITY ("9.0"), FAKE_CUDA_MEMORY (bytes, 1 GiB),
// FAKE_CUDA_SMS (multiprocessors, 132), FAKE_CUDA_NO_IMAGE (a library load finds no code), FAKE_CUDA_ANY_KERNEL (every
// name is a kernel, which does nothing; the last of a draw counts its steps), FAKE_CUDA_KERNELS (a folder of kernels
// for the CPU, see tests/kernels_on_cpu: the kernels are these, and run), FAKE_CUDA_DELAY_US (longest delay of an
// operation, 50).
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels.h"

typedef int Status;
enum {
    OK = 0,
    INVALID = 1,
    OOM = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    NO_BINARY = 209,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_FAILED = 719
};

typedef struct Event {
    pthread_mutex_t lock;
    pthread_cond_t done_changed;
    uint64_t recorded, done;
} Event;
typedef enum { COPY, SET, MARK, FOLLOW, KERNEL } Kind;
enum { MOST_PARAMS = 1024, SAMPLE_PARAMS = 160 };
typedef struct Op {
    Kind kind;
    void* to;
    const void* from;
    size_t n;
    int value;
    Event* event;
    uint64_t generation;
    const Function* kernel;
    unsigned size[7];  // grid, block, dynamic shared memory
    int pdl;
    _Alignas(16) unsigned char params[MOST_PARAMS];
    struct Op* next;
} Op;
typedef struct Stream {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    Op *head, *tail;
    int busy, stop;
    int blocking;  // the default stream waits for it
    struct Graph* capture;
} Stream;
typedef struct Graph {
    Op *head, *tail;
    size_t n;
    int launched;
} Graph;
typedef struct Block {
    char* at;
    size_t n;
    int host, managed;
    struct Block* next;
} Block;

// Told of every launch: the kernel's name, seven unsigned ints (grid, block, shared memory), the number of attributes,
// the parameters, and whether it is recorded in a graph.
typedef void (*Watcher)(const char*, const unsigned*, unsigned, const void*, int);

static pthread_mutex_t heap = PTHREAD_MUTEX_INITIALIZER;
static Block* blocks;
static size_t used;
static Status sticky;
static int ready, contexts, live_streams, live_events, live_libraries, new_graphs;
static __thread int current;
enum { MOST_STREAMS = 256 };
static Stream* streams[MOST_STREAMS];
static Watcher watcher;
static pthread_mutex_t streams_lock = PTHREAD_MUTEX_INITIALIZER;

static long setting(const char* name, long otherwise) {
    const char* s = getenv(name);
    return s ? atol(s) : otherwise;
}
static size_t capacity(void) { return setting("FAKE_CUDA_MEMORY", 1L << 30); }

static int inside(const void* p, size_t n, int host) {
    int found = 0;
    pthread_mutex_lock(&heap);
    for (Block* b = blocks; b; b = b->next)
        if (b->host == host && (char*)p >= b->at && (char*)p + n <= b->at + b->n) found = 1;
    pthread_mutex_unlock(&heap);
    return found;
}

static Status allocate(void** out, size_t n, int host) {
    pthread_mutex_lock(&heap);
    Status status = OOM;
    if (host || used + n <= capacity()) {
        Block* b = malloc(sizeof *b);
        b->at = aligned_alloc(256, (n + 255) / 256 * 256), b->n = n, b->host = host, b->managed = 0, b->next = blocks;
        memset(b->at, 0xEE, n);
        blocks = b, *out = b->at, status = OK;
        if (!host) used += n;
    }
    pthread_mutex_unlock(&heap);
    return status;
}

static Status release(void* p) {
    Status status = INVALID;
    pthread_mutex_lock(&heap);
    for (Block** b = &blocks; *b; b = &(*b)->next)
        if ((*b)->at == p) {
            Block* gone = *b;
            *b = gone->next;
            if (!gone->host) used -= gone->n;
            memset(gone->at, 0xDD, gone->n);  // whoever still reads it sees it
            free(gone->at), free(gone), status = OK;
            break;
        }
    pthread_mutex_unlock(&heap);
    return status;
}

// ---- what a stream's thread does

static void run(Op* op) {
    long delay = setting("FAKE_CUDA_DELAY_US", 50);
    if (delay > 0) usleep(rand() % delay);
    if (sticky && op->kind != MARK) return;
    switch (op->kind) {
        case COPY:
            memcpy(op->to, op->from, op->n);
            break;
        case SET:
            memset(op->to, op->value, op->n);
            break;
        case MARK:
            pthread_mutex_lock(&op->event->lock);
            if (op->generation > op->event->done) op->event->done = op->generation;
            pthread_cond_broadcast(&op->event->done_changed);
            pthread_mutex_unlock(&op->event->lock);
            break;
        case FOLLOW:
            pthread_mutex_lock(&op->event->lock);
            while (op->event->done < op->generation) pthread_cond_wait(&op->event->done_changed, &op->event->lock);
            pthread_mutex_unlock(&op->event->lock);
            break;
        case KERNEL:
            if (op->kernel->kernel) {
                Status status = run_kernel(op->kernel, op->size, op->pdl, op->params);
                if (status) sticky = status;
            } else if (!strcmp(op->kernel->name, "copy")) {  // struct { const void *from; void *to; size_t n; }
                struct {
                    const void* from;
                    void* to;
                    size_t n;
                } p;
                memcpy(&p, op->params, sizeof p);
                if (inside(p.from, p.n, 0) && inside(p.to, p.n, 0))
                    memcpy(p.to, p.from, p.n);
                else
                    sticky = ILLEGAL_ADDRESS;
            } else if (!strcmp(op->kernel->name, "fault"))
                sticky = ILLEGAL_ADDRESS;
            else if (!strncmp(op->kernel->name, "sample_", 7)) {  // csrc/params/sample_params.h; draws what is there
                struct {
                    const void* others[17];
                    uint64_t *step, *host_step;
                    int32_t draw_follows;
                } p;
                memcpy(&p, op->params, sizeof p);
                if (p.draw_follows && strcmp(op->kernel->name, "sample_draw")) break;
                ++*p.step;
                if (p.host_step) __atomic_store_n(p.host_step, *p.step, __ATOMIC_RELEASE);
            }
    }
}

static void* serve(void* arg) {
    Stream* s = arg;
    pthread_mutex_lock(&s->lock);
    for (;;) {
        while (!s->head && !s->stop) pthread_cond_wait(&s->changed, &s->lock);
        if (!s->head) break;
        Op* op = s->head;
        s->head = op->next, s->busy = 1;
        if (!s->head) s->tail = NULL;
        pthread_mutex_unlock(&s->lock);
        run(op);
        free(op);
        pthread_mutex_lock(&s->lock);
        s->busy = 0;
        pthread_cond_broadcast(&s->changed);
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

static Status push(Stream* s, Op op) {
    if (sticky) return sticky;
    Op* copy = malloc(sizeof op);
    *copy = op, copy->next = NULL;
    if (s->capture) {
        Graph* g = s->capture;
        if (g->tail)
            g->tail->next = copy;
        else
            g->head = copy;
        g->tail = copy, ++g->n;
        return OK;
    }
    pthread_mutex_lock(&s->lock);
    if (s->tail)
        s->tail->next = copy;
    else
        s->head = copy;
    s->tail = copy;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    return OK;
}

// Waits for the streams that calls of the default stream wait for; with kernels that run, for `all` of them.
static void wait_for_streams(int all) {
    pthread_mutex_lock(&streams_lock);
    for (int i = 0; i < MOST_STREAMS; ++i) {
        Stream* s = streams[i];
        if (!s || !(s->blocking || (all && has_kernels()))) continue;
        pthread_mutex_lock(&s->lock);
        while (s->head || s->busy) pthread_cond_wait(&s->changed, &s->lock);
        pthread_mutex_unlock(&s->lock);
    }
    pthread_mutex_unlock(&streams_lock);
}

// ---- the driver's functions

Status cuInit(unsigned f) {
    if (setting("FAKE_CUDA_DEVICES", 1) == 0) return NO_DEVICE;
    ready = 1;
    return OK;
}
Status cuDriverGetVersion(int* v) {
    *v = 13000;
    return OK;
}
Status cuDeviceGetCount(int* n) {
    if (!ready) return NOT_INITIALIZED;
    *n = setting("FAKE_CUDA_DEVICES", 1);
    return OK;
}
Status cuDeviceGet(int* d, int i) {
    *d = i;
    return i < setting("FAKE_CUDA_DEVICES", 1) ? OK : INVALID_DEVICE;
}
Status cuDeviceGetName(char* out, int n, int d) {
    snprintf(out, n, "Fake GPU %d", d);
    return OK;
}
Status cuDeviceTotalMem(size_t* n, int d) {
    *n = capacity();
    return OK;
}
Status cuDeviceTotalMem_v2(size_t* n, int d) { return cuDeviceTotalMem(n, d); }
Status cuDeviceGetPCIBusId(char* out, int n, int d) {
    snprintf(out, n, "0000:%02x:00.0", d);
    return OK;
}
Status cuDeviceGetAttribute(int* v, int which, int d) {
    const char* cc = getenv("FAKE_CUDA_CAPABILITY");
    int major = 9, minor = 0;
    if (cc) sscanf(cc, "%d.%d", &major, &minor);
    *v = which == 75   ? major
         : which == 76 ? minor
         : which == 16 ? (int)setting("FAKE_CUDA_SMS", 132)
         : which == 97 ? 232448
                       : 0;
    return OK;
}
Status cuDevicePrimaryCtxRetain(void** c, int d) {
    ++contexts;
    *c = (void*)(intptr_t)(d + 1);
    return OK;
}
Status cuDevicePrimaryCtxRelease(int d) {
    if (--contexts == 0) sticky = OK;
    return OK;
}
Status cuCtxSetCurrent(void* c) {
    current = (intptr_t)c;
    return OK;
}
Status cuMemGetInfo(size_t* f, size_t* t) {
    if (!current) return INVALID_CONTEXT;
    *t = capacity();
    *f = *t - used;
    return sticky;
}
Status cuGetErrorName(Status s, const char** out) {
    static const struct {
        Status s;
        const char* name;
    } names[] = {{INVALID, "CUDA_ERROR_INVALID_VALUE"},
                 {OOM, "CUDA_ERROR_OUT_OF_MEMORY"},
                 {NO_DEVICE, "CUDA_ERROR_NO_DEVICE"},
                 {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED"},
                 {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
                 {NO_BINARY, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
                 {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"},
                 {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
                 {999, "CUDA_ERROR_UNKNOWN"},
                 {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED"},
                 {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"},
                 {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"}};
    for (size_t i = 0; i < sizeof names / sizeof *names; ++i)
        if (names[i].s == s) {
            *out = names[i].name;
            return OK;
        }
    *out = NULL;
    return INVALID;
}

Status cuMemAlloc(uint64_t* p, size_t n) {
    if (!current) return INVALID_CONTEXT;
    return sticky ? sticky : allocate((void**)p, n, 0);
}
Status cuMemAllocManaged(uint64_t* p, size_t n, unsigned f) {
    Status status = cuMemAlloc(p, n);
    pthread_mutex_lock(&heap);
    for (Block* b = blocks; b && !status; b = b->next)
        if (b->at == (char*)*p) b->managed = 1;
    pthread_mutex_unlock(&heap);
    return status;
}
Status cuMemFree(uint64_t p) {
    wait_for_streams(1);
    return release((void*)p);
}
Status cuMemHostAlloc(void** p, size_t n, unsigned f) { return sticky ? sticky : allocate(p, n, 1); }
Status cuMemFreeHost(void* p) { return release(p); }
Status cuMemHostGetDevicePointer(uint64_t* p, void* h, unsigned f) {
    *p = (uint64_t)h;
    return OK;
}
Status cuMemcpyHtoD(uint64_t to, const void* from, size_t n) {
    wait_for_streams(0);
    if (sticky) return sticky;
    if (!inside((void*)to, n, 0)) return sticky = ILLEGAL_ADDRESS;
    memcpy((void*)to, from, n);
    return OK;
}
Status cuMemcpyDtoH(void* to, uint64_t from, size_t n) {
    wait_for_streams(0);
    if (sticky) return sticky;
    if (!inside((void*)from, n, 0)) return sticky = ILLEGAL_ADDRESS;
    memcpy(to, (void*)from, n);
    return OK;
}
Status cuMemsetD8(uint64_t p, unsigned char v, size_t n) {
    wait_for_streams(0);
    if (!inside((void*)p, n, 0)) return sticky = ILLEGAL_ADDRESS;
    memset((void*)p, v, n);
    return sticky;
}
Status cuMemcpyHtoDAsync(uint64_t to, const void* from, size_t n, Stream* s) {
    if (!inside((void*)to, n, 0) || !inside(from, n, 1)) return sticky = ILLEGAL_ADDRESS;
    return push(s, (Op){.kind = COPY, .to = (void*)to, .from = from, .n = n});
}
Status cuMemcpyDtoHAsync(void* to, uint64_t from, size_t n, Stream* s) {
    if (!inside((void*)from, n, 0) || !inside(to, n, 1)) return sticky = ILLEGAL_ADDRESS;
    return push(s, (Op){.kind = COPY, .to = to, .from = (void*)from, .n = n});
}
Status cuMemcpyDtoDAsync(uint64_t to, uint64_t from, size_t n, Stream* s) {
    return push(s, (Op){.kind = COPY, .to = (void*)to, .from = (void*)from, .n = n});
}
Status cuMemsetD8Async(uint64_t to, unsigned char v, size_t n, Stream* s) {
    return push(s, (Op){.kind = SET, .to = (void*)to, .value = v, .n = n});
}
Status cuPointerGetAttributes(unsigned n, const int* which, void** out, uint64_t p) {
    if (!inside((void*)p, 1, 0)) return INVALID;
    *(unsigned*)out[0] = 2, *(int*)out[1] = 0;  // device memory
    pthread_mutex_lock(&heap);
    for (Block* b = blocks; b; b = b->next)
        if ((char*)p >= b->at && (char*)p < b->at + b->n) *(int*)out[1] = b->managed;
    pthread_mutex_unlock(&heap);
    return OK;
}
Status cuPointerGetAttribute(void* out, int which, uint64_t p) { return INVALID; }

Status cuStreamCreate(Stream** out, unsigned f) {
    if (sticky) return sticky;
    Stream* s = calloc(1, sizeof *s);
    s->blocking = !(f & 1);
    pthread_mutex_init(&s->lock, NULL), pthread_cond_init(&s->changed, NULL);
    pthread_create(&s->thread, NULL, serve, s);
    __sync_fetch_and_add(&live_streams, 1);
    pthread_mutex_lock(&streams_lock);
    for (int i = 0; i < MOST_STREAMS; ++i)
        if (!streams[i]) {
            streams[i] = s;
            break;
        }
    pthread_mutex_unlock(&streams_lock);
    *out = s;
    return OK;
}
Status cuStreamDestroy(Stream* s) {
    pthread_mutex_lock(&streams_lock);
    for (int i = 0; i < MOST_STREAMS; ++i)
        if (streams[i] == s) streams[i] = NULL;
    pthread_mutex_unlock(&streams_lock);
    pthread_mutex_lock(&s->lock);
    s->stop = 1;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    pthread_join(s->thread, NULL);
    __sync_fetch_and_sub(&live_streams, 1);
    free(s);
    return OK;
}
Status cuStreamSynchronize(Stream* s) {
    pthread_mutex_lock(&s->lock);
    while (s->head || s->busy) pthread_cond_wait(&s->changed, &s->lock);
    pthread_mutex_unlock(&s->lock);
    return sticky;
}
Status cuStreamQuery(Stream* s) {
    pthread_mutex_lock(&s->lock);
    int idle = !s->head && !s->busy;
    pthread_mutex_unlock(&s->lock);
    return sticky ? sticky : idle ? OK : NOT_READY;
}
Status cuCtxSynchronize(void) {
    pthread_mutex_lock(&streams_lock);
    for (int i = 0; i < MOST_STREAMS; ++i)
        if (streams[i]) cuStreamSynchronize(streams[i]);
    pthread_mutex_unlock(&streams_lock);
    return sticky;
}

Status cuEventCreate(Event** out, unsigned f) {
    if (sticky) return sticky;
    Event* e = calloc(1, sizeof *e);
    pthread_mutex_init(&e->lock, NULL), pthread_cond_init(&e->done_changed, NULL);
    __sync_fetch_and_add(&live_events, 1);
    *out = e;
    return OK;
}
Status cuEventDestroy(Event* e) {
    __sync_fetch_and_sub(&live_events, 1);
    return OK;
}  // leaked: streams may still use it
Status cuEventRecord(Event* e, Stream* s) {
    pthread_mutex_lock(&e->lock);
    uint64_t generation = ++e->recorded;
    pthread_mutex_unlock(&e->lock);
    return push(s, (Op){.kind = MARK, .event = e, .generation = generation});
}
Status cuStreamWaitEvent(Stream* s, Event* e, unsigned f) {
    pthread_mutex_lock(&e->lock);
    uint64_t generation = e->recorded;
    pthread_mutex_unlock(&e->lock);
    return push(s, (Op){.kind = FOLLOW, .event = e, .generation = generation});
}
Status cuEventSynchronize(Event* e) {
    pthread_mutex_lock(&e->lock);
    while (e->done < e->recorded) pthread_cond_wait(&e->done_changed, &e->lock);
    pthread_mutex_unlock(&e->lock);
    return sticky;
}
Status cuEventQuery(Event* e) { return sticky ? sticky : e->done < e->recorded ? NOT_READY : OK; }
Status cuEventElapsedTime(float* ms, Event* a, Event* b) {
    if (sticky) return sticky;
    if (!a->recorded || !b->recorded) return INVALID_HANDLE;
    *ms = 1;
    return OK;
}

Status cuLibraryLoadData(void** out, const void* code, void* a, void* b, unsigned c, void* d, void* e, unsigned f) {
    if (getenv("FAKE_CUDA_NO_IMAGE")) return NO_BINARY;
    __sync_fetch_and_add(&live_libraries, 1);
    *out = (void*)1;
    return OK;
}
Status cuLibraryUnload(void* l) {
    __sync_fetch_and_sub(&live_libraries, 1);
    return OK;
}
static Status get_kernel(void** out, const char* name) {
    if (has_kernels()) {
        Function* f = find_kernel(name);
        *out = f;
        return !f ? NOT_FOUND : f->kernel->param_bytes > MOST_PARAMS ? INVALID : OK;
    }
    if (strcmp(name, "copy") && strcmp(name, "fault") && !getenv("FAKE_CUDA_ANY_KERNEL")) return NOT_FOUND;
    Function* f = calloc(1, sizeof *f);
    f->name = strdup(name);
    *out = f;
    return OK;
}
Status cuLibraryGetKernel(void** out, void* l, const char* name) { return get_kernel(out, name); }
Status cuKernelGetFunction(void** out, void* k) {
    *out = k;
    return OK;
}
Status cuModuleLoadData(void** out, const void* code) { return cuLibraryLoadData(out, code, 0, 0, 0, 0, 0, 0); }
Status cuModuleUnload(void* m) { return cuLibraryUnload(m); }
Status cuModuleGetFunction(void** out, void* m, const char* name) { return get_kernel(out, name); }
Status cuFuncSetAttribute(Function* f, int which, int v) {
    if (v > 232448) return INVALID;
    if (which == 8) f->most_dynamic = v;
    return OK;
}
Status cuFuncGetParamInfo(const Function* f, size_t i, size_t* offset, size_t* size) {
    if (i > 0 || (!f->kernel && strcmp(f->name, "copy"))) return INVALID;
    *offset = 0, *size = f->kernel ? f->kernel->param_bytes : 24;
    return OK;
}
Status cuFuncGetAttribute(int* v, int which, void* f) {
    *v = 32;
    return OK;
}
Status cuLaunchKernelEx(const void* config, const Function* f, void** params, void** extra) {
    Stream* s = *(Stream**)((const char*)config + 32);  // after seven unsigned ints
    const char* attributes = *(const char**)((const char*)config + 40);
    const unsigned n_attributes = *(const unsigned*)((const char*)config + 48);
    if (watcher) watcher(f->name, config, n_attributes, params[0], s->capture != NULL);
    Op op = {.kind = KERNEL, .kernel = f};
    memcpy(op.size, config, sizeof op.size);
    if (f->kernel && !is_possible(f, op.size)) return INVALID;
    for (unsigned i = 0; i < n_attributes; ++i) {  // 72 bytes each: which, then the value at byte 8
        int which, value;
        memcpy(&which, attributes + 72 * i, 4), memcpy(&value, attributes + 72 * i + 8, 4);
        op.pdl |= which == 6 && value;
    }
    memcpy(op.params, params[0],
           f->kernel                         ? f->kernel->param_bytes
           : !strcmp(f->name, "copy")        ? 24
           : !strncmp(f->name, "sample_", 7) ? SAMPLE_PARAMS
                                             : 0);
    return push(s, op);
}

Status cuStreamBeginCapture(Stream* s, int mode) {
    s->capture = calloc(1, sizeof(Graph));
    return OK;
}
Status cuStreamEndCapture(Stream* s, Graph** out) {
    *out = s->capture;
    s->capture = NULL;
    return *out ? OK : INVALID;
}
Status cuGraphGetNodes(Graph* g, void* nodes, size_t* n) {
    *n = g->n;
    return OK;
}
Status cuGraphInstantiateWithFlags(Graph** out, Graph* g, unsigned long long f) {
    *out = malloc(sizeof *g);
    **out = *g;
    __sync_fetch_and_add(&new_graphs, 1);
    return OK;
}
Status cuGraphDestroy(Graph* g) {
    free(g);
    return OK;
}  // the executable graph keeps the operations
Status cuGraphExecDestroy(Graph* g) {
    if (!g->launched) __sync_fetch_and_sub(&new_graphs, 1);
    free(g);
    return OK;
}
Status cuGraphLaunch(Graph* g, Stream* s) {
    if (!g->launched) __sync_fetch_and_sub(&new_graphs, 1);
    g->launched = 1;
    for (Op* op = g->head; op; op = op->next) {
        Status status = push(s, *op);
        if (status) return status;
    }
    return OK;
}

Status cuGetProcAddress_v2(const char* symbol, void** out, int version, uint64_t flags, void* found) {
    void* self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    *out = self ? dlsym(self, !strcmp(symbol, "cuGraphInstantiate") ? "cuGraphInstantiateWithFlags" : symbol) : NULL;
    return *out ? OK : NOT_FOUND;
}

// ---- for the tests

size_t fake_device_bytes(void) { return used; }
size_t fake_host_blocks(void) {
    size_t n = 0;
    for (Block* b = blocks; b; b = b->next) n += b->host;
    return n;
}
int fake_live(void) { return live_streams + live_events + live_libraries; }
// Graphs that are ready and were never launched.
int fake_new_graphs(void) { return new_graphs; }
int fake_contexts(void) { return contexts; }
void fake_watch_launches(Watcher w) { watcher = w; }
// The start of the block that an address lies in, 0 where there is none.
uint64_t fake_block_of(uint64_t p) {
    uint64_t found = 0;
    pthread_mutex_lock(&heap);
    for (Block* b = blocks; b; b = b->next)
        if (p >= (uint64_t)b->at && p < (uint64_t)b->at + b->n) found = (uint64_t)b->at;
    pthread_mutex_unlock(&heap);
    return found;
}
