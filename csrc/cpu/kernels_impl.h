// Assembles the kernels of one instruction set: included, once, by each kernels_<isa>.cpp inside its own namespace.
//
// Everything here has internal linkage and uses nothing of the standard library: an inline function shared with the
// baseline objects could otherwise end up compiled for a processor that is not there.
#pragma once

#include "quant.h"
#include "ops_impl.h"
#include "matmul_impl.h"
#ifdef WO_CODES
#include "codes.h"
#include "encode_impl.h"
#include "code_matmul_impl.h"
#else  // the products of codes that are not there
constexpr auto has_codes = nullptr, encodable = nullptr, encode = nullptr, code_matvec = nullptr, code_panel = nullptr;
constexpr int kEncodedTokens = 1;
#endif
#include "attention_impl.h"

static const Kernels kTable = {
    WO_ISA_NAME, dequantize, matvec,         matmul_panel, has_codes, encodable, encode,
    code_matvec, code_panel, kEncodedTokens, norm,         rope,      kv_write,  attention,
    glu,         act,        add_n,          scale_n,      axpy,      exp_n,
};
