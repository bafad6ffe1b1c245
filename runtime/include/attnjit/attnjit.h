/* attnjit's C interface: attention whose scores pass through a compiled expression.
 *
 * Tensors are borrowed DLPack DLTensors; nothing is copied or owned. Every call returns a status; the message of the
 * calling thread's last failure is attnjit_last_error(). No exception crosses this interface. A context may be used
 * from several threads at once; a plan likewise, each call with its own workspace.
 *
 * Structs that may grow carry their size in `struct_size`; zero-initialise them (ATTNJIT_*_INIT). */
#ifndef ATTNJIT_ATTNJIT_H
#define ATTNJIT_ATTNJIT_H

#include <dlpack/dlpack.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define ATTNJIT_API __attribute__((visibility("default")))
#else
#define ATTNJIT_API
#endif

/* In C++, any int is a value of these enums: what a C caller passes can be refused instead of being undefined. */
#ifdef __cplusplus
#define ATTNJIT_ENUM : int
extern "C" {
#else
#define ATTNJIT_ENUM
#endif

/* What went wrong, and whose fault it was. */
typedef enum attnjit_status ATTNJIT_ENUM {
  ATTNJIT_OK = 0,
  ATTNJIT_INVALID_ARGUMENT = 1,   /* the caller's: a tensor, an option */
  ATTNJIT_INVALID_EXPRESSION = 2, /* the caller's: the message holds line, column and a caret */
  ATTNJIT_UNSUPPORTED = 3,        /* no permitted backend serves the problem; the message lists each with its reason */
  ATTNJIT_OUT_OF_MEMORY = 4,
  ATTNJIT_ENVIRONMENT = 5, /* the machine's: a file, a library, a device */
  ATTNJIT_INTERNAL = 6,    /* ours: please report it */
  ATTNJIT_NOT_PREPARED = 7 /* the call would have to compile while its stream is captured: prepare it beforehand */
} attnjit_status;

ATTNJIT_API const char* attnjit_status_name(attnjit_status status);
/* The message of this thread's last failed call; "" when none failed. Valid until this thread's next call. */
ATTNJIT_API const char* attnjit_last_error(void);
/* "major.minor.patch". The soname changes with the major version (with the minor one while it is 0). */
ATTNJIT_API const char* attnjit_version(void);

/* ---- Context ---------------------------------------------------------------------------------------------------- */

typedef struct attnjit_context attnjit_context;

typedef struct attnjit_context_options {
  size_t struct_size;
  int num_threads; /* CPU threads of one call, the caller's included; 0: one per processor this process may use */
  uint32_t
      backends; /* those that may be picked: 1u << attnjit_backend of each; 0: what ATTNJIT_BACKENDS says, or all */
} attnjit_context_options;
#define ATTNJIT_CONTEXT_OPTIONS_INIT {sizeof(attnjit_context_options), 0, 0}

/* `options` may be NULL. */
ATTNJIT_API attnjit_status attnjit_context_create(const attnjit_context_options* options, attnjit_context** context);
/* NULL is allowed. Plans made from a context stay usable after it is destroyed. */
ATTNJIT_API void attnjit_context_destroy(attnjit_context* context);

/* Gives an expression a name that later texts may use: `name` alone, or `name(argument, ...)`. is_mask: the body is a
 * condition that says which elements are kept. A name that is taken is refused. */
ATTNJIT_API attnjit_status attnjit_register_mod(attnjit_context* context, const char* name,
                                                const char* const* parameters, size_t num_parameters, const char* body,
                                                int is_mask);

/* ---- One attention call ----------------------------------------------------------------------------------------- */

typedef enum attnjit_backend ATTNJIT_ENUM {
  ATTNJIT_BACKEND_AUTO = 0, /* the fastest that serves the problem where its tensors are */
  ATTNJIT_BACKEND_MATH = 1, /* eager: materialised scores; on the CPU one pass per operation of the expression */
  ATTNJIT_BACKEND_CPU = 2,  /* fused, compiled for the host's processor */
  ATTNJIT_BACKEND_SM80 = 3, /* fused, for CUDA devices of compute capability 8.0 and later */
  ATTNJIT_BACKEND_SM90 = 4  /* fused forward, for CUDA devices of compute capability 9.0: TMA and wgmma */
} attnjit_backend;
ATTNJIT_API const char* attnjit_backend_name(attnjit_backend backend);

/* A captured tensor (or, with ndim 0, scalar) of an expression, by the name it has there. A call on a CUDA device takes
 * its scalars from there too, or from the CPU: the value is read during attnjit_run then, and a captured CUDA graph
 * keeps it, while a scalar in device memory is read at each replay. */
typedef struct attnjit_capture {
  const char* name;
  const DLTensor* tensor; /* bool, int8/16/32/64, uint8, float16, bfloat16, float32; rank 0 to 5; strides from 0 */
} attnjit_capture;

/* The arguments of one call, the same for prepare and run.
 *
 * All tensors are on one device: kDLCPU (kDLCUDAHost is CPU memory), or one kDLCUDA device (kDLCUDAManaged belongs to
 * its device_id). On a device, pointers are those of its primary context, which the CUDA runtime works in.
 * q (B, Hq, Sq, D), k (B, Hkv, Skv, D), v (B, Hkv, Skv, Dv), o (B, Hq, Sq, Dv); float32, float16 or bfloat16, one type
 * for all four; Hq a multiple of Hkv; D and Dv from 1 to 256; the innermost stride 1, any others for q, k and v (0
 * broadcasts); o must not overlap itself or an input. lse and row_max: (B, Hq, Sq) float32, or NULL. */
typedef struct attnjit_attention {
  size_t struct_size;
  const char* score_mod; /* an expression or a registered name; NULL: noop */
  const char* mask_mod;  /* a condition to keep an element, applied after score_mod; NULL: none */
  const DLTensor* q;
  const DLTensor* k;
  const DLTensor* v;
  DLTensor* o;
  DLTensor* lse;     /* natural logarithm of the row's sum of exponentials; -inf for a fully masked row */
  DLTensor* row_max; /* maximum of the row's modified scores, +inf before NaN; -inf for a fully masked row */
  const attnjit_capture* captures;
  size_t num_captures;
  const float* scale;      /* multiplies q . k before the score_mod; NULL: 1 / sqrt(D) */
  attnjit_backend backend; /* restricts the choice */
  /* 1: where a plan is made on a CUDA device, a few configurations of its kernel are compiled and timed there, over
   * memory of their own, and the fastest is kept, for later processes in the disk cache. 0: the usual configuration.
   * The result may differ in its rounding, as summation orders do. Where nothing can be timed (no memory, or a capture
   * that forbids the legacy default stream) the usual configuration is taken; the plan's description says so. Ignored
   * by attnjit_run, and on the CPU. */
  int max_autotune;
} attnjit_attention;
#define ATTNJIT_ATTENTION_INIT \
  {sizeof(attnjit_attention), NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0, NULL, ATTNJIT_BACKEND_AUTO, 0}

typedef struct attnjit_plan attnjit_plan;

/* Validates, picks a backend and compiles, or finds the compiled plan; on a CUDA device, loads it. Data is not read and
 * pointers may be NULL; what is given there on a CUDA device says how far data is aligned, and NULL counts as 16 bytes.
 * Threads that ask for one problem at once wait for one compile. A stream capture that is under way goes on
 * undisturbed.
 */
ATTNJIT_API attnjit_status attnjit_prepare(attnjit_context* context, const attnjit_attention* attention,
                                           attnjit_plan** plan);
ATTNJIT_API void attnjit_plan_destroy(attnjit_plan* plan); /* NULL is allowed */

/* Bytes of scratch memory that one run needs, 0 included: aligned to 64 bytes, or to 256 in the memory of the plan's
 * CUDA device. */
ATTNJIT_API size_t attnjit_plan_workspace_size(const attnjit_plan* plan);
ATTNJIT_API attnjit_backend attnjit_plan_backend(const attnjit_plan* plan);
/* The plan as JSON: backend, canonical expression, hash, facts, cached or compiled, milliseconds by phase. Owned by the
 * plan. */
ATTNJIT_API const char* attnjit_plan_description(const attnjit_plan* plan);

/* Runs a prepared plan. Shapes, strides classes, dtypes, device, texts and captured names must be those that were
 * prepared; data, captured values and scale may change. Does not compile, allocate or read the environment.
 * `workspace` may be NULL when its size is 0.
 *
 * CPU: computes before it returns; `stream` must be NULL. CUDA: `stream` is a CUstream of the device's primary context,
 * NULL the legacy default stream; the work is queued there, or captured into a graph. Tensors and workspace must stay
 * until it is done, and a graph needs its plan for as long as it is replayed. Rows must be aligned as far as they were
 * when the plan was prepared. */
ATTNJIT_API attnjit_status attnjit_run(attnjit_plan* plan, const attnjit_attention* attention, void* workspace,
                                       size_t workspace_size, void* stream);

/* attnjit_prepare and attnjit_run in one, for a caller that keeps no plans. `workspace` as the plan needs it; what is
 * too small is refused with the size. Where there is no plan yet and `stream` is being captured into a graph, nothing
 * is compiled: ATTNJIT_NOT_PREPARED, and the capture goes on undisturbed. */
ATTNJIT_API attnjit_status attnjit_forward(attnjit_context* context, const attnjit_attention* attention,
                                           void* workspace, size_t workspace_size, void* stream);

/* ---- Gradients -------------------------------------------------------------------------------------------------- */

/* A captured tensor whose gradient is wanted. */
typedef struct attnjit_capture_gradient {
  const char* name; /* as in attnjit_attention.captures */
  DLTensor* tensor; /* of the captured tensor's shape and type, which has to be a floating one; its own strides */
} attnjit_capture_gradient;

/* What the backward of a call is given beside its attnjit_attention, and what it computes.
 *
 * attention->o and attention->lse are then what the forward computed: inputs. lse is needed. Merged over several calls
 * (devices), each with some of the keys, they serve too, see partial_keys. attention->row_max is ignored. All are on
 * the call's device. Gradients are of sum(grad_out * o) + sum(grad_lse * lse). Where the expression has a kink they are
 * PyTorch's. An element that is dropped, a branch that is not taken and a row without a kept element contribute exactly
 * zero. */
typedef struct attnjit_gradients {
  size_t struct_size;
  const DLTensor* grad_out; /* (B, Hq, Sq, Dv), q's type; the innermost stride 1, any others (0 broadcasts) */
  const DLTensor* grad_lse; /* (B, Hq, Sq) float32, or NULL: nothing flows into lse */
  DLTensor* dq;             /* (B, Hq, Sq, D), or NULL: not wanted. Outputs, of q's type, innermost stride 1 */
  DLTensor* dk;             /* (B, Hkv, Skv, D), or NULL */
  DLTensor* dv;             /* (B, Hkv, Skv, Dv), or NULL */
  const attnjit_capture_gradient* captures;
  size_t num_captures;
  /* 1: two runs on one machine give the same bits. What it costs is in docs/backward.md. 0: sums may be added in any
   * order. */
  int deterministic;
  /* 1: k and v are a part of the keys that o and lse are of. Gradients are what this part contributes: dk and dv of its
   * keys, and of the rest a sum over the parts gives the whole. 0: o and lse are of these keys; what a captured term
   * that shifts a whole row (`score + u[q_idx]`) gets is then taken from grad_lse alone (docs/backward.md). */
  int partial_keys;
} attnjit_gradients;
#define ATTNJIT_GRADIENTS_INIT {sizeof(attnjit_gradients), NULL, NULL, NULL, NULL, NULL, NULL, 0, 0, 0}

/* As attnjit_prepare, for the backward, which does not look at max_autotune. Where `forward` is not NULL, it receives
 * the plan of attnjit_prepare for `attention` with its lse: both are compiled at the same time. */
ATTNJIT_API attnjit_status attnjit_prepare_backward(attnjit_context* context, const attnjit_attention* attention,
                                                    const attnjit_gradients* gradients, attnjit_plan** forward,
                                                    attnjit_plan** backward);
/* As attnjit_run, with a plan of attnjit_prepare_backward. Which gradients are wanted must be as prepared. */
ATTNJIT_API attnjit_status attnjit_run_backward(attnjit_plan* plan, const attnjit_attention* attention,
                                                const attnjit_gradients* gradients, void* workspace,
                                                size_t workspace_size, void* stream);
/* As attnjit_forward: both in one. */
ATTNJIT_API attnjit_status attnjit_backward(attnjit_context* context, const attnjit_attention* attention,
                                            const attnjit_gradients* gradients, void* workspace, size_t workspace_size,
                                            void* stream);

/* ---- Checking and explaining ------------------------------------------------------------------------------------ */

/* One query row of a problem. */
typedef struct attnjit_row {
  int64_t b, h, q_idx;
} attnjit_row;

/* The double-precision oracle, from the same (rounded) inputs, by interpreting the expression: slow, exact.
 * o (num_rows, Dv), lse and row_max (num_rows), any of them NULL. attention->o, lse, row_max and backend are ignored.
 */
ATTNJIT_API attnjit_status attnjit_reference(attnjit_context* context, const attnjit_attention* attention,
                                             const attnjit_row* rows, size_t num_rows, double* o, double* lse,
                                             double* row_max);

/* What a fused kernel that computes in float32 may be off by (docs/numerics.md), for the rows of attnjit_reference:
 * o_bound (num_rows, Dv): of |o - gold|, for an o of q's element type;
 * lse_bound (num_rows): of |lse - gold|;
 * decided (num_rows): 0 where float32 does not decide the row, because an element is within its rounding error of a
 * jump of the expression, because the expression overflows or because it is ill-conditioned; 1 elsewhere.
 * A bound is infinite where nothing can be said: in rows that are not decided, and where a value of V that is not
 * finite meets a probability of (nearly) 0. Any of the three may be NULL. attention->o, lse, row_max and backend are
 * ignored. */
ATTNJIT_API attnjit_status attnjit_reference_bounds(attnjit_context* context, const attnjit_attention* attention,
                                                    const attnjit_row* rows, size_t num_rows, double* o_bound,
                                                    double* lse_bound, unsigned char* decided);

/* The double-precision oracle of the backward, for all of batch `b` and key/value head `h_kv`, that is the query heads
 * h_kv * Hq / Hkv and on: dq (Hq / Hkv, Sq, D), dk (Skv, D), dv (Skv, Dv), and of each of gradients->captures, in that
 * order and packed, the part that these heads contribute. Everything is computed anew from q, k, v and grad_out:
 * attention->o and lse are ignored, as are outputs' data; with gradients->partial_keys they are read and taken as they
 * are. Each output has a bound beside it: what a fused kernel that computes in float32 and is given a right o and lse
 * (the same ones) may be off by (docs/numerics.md), infinite where nothing can be said. Any pointer may be NULL, and
 * `captures` and `capture_bounds` may be NULL where there are none. */
typedef struct attnjit_reference_gradients {
  size_t struct_size;
  double *dq, *dk, *dv;
  double* const* captures; /* num_captures of them */
  double *dq_bound, *dk_bound, *dv_bound;
  double* const* capture_bounds;
} attnjit_reference_gradients;
#define ATTNJIT_REFERENCE_GRADIENTS_INIT \
  {sizeof(attnjit_reference_gradients), NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL}
ATTNJIT_API attnjit_status attnjit_reference_backward(attnjit_context* context, const attnjit_attention* attention,
                                                      const attnjit_gradients* gradients, int64_t b, int64_t h_kv,
                                                      const attnjit_reference_gradients* out);

/* The check mode of captured reads, for the rows of attnjit_reference: which indices lay outside their dimension, and
 * were clamped, in reads that decide the result of an element (not in the branch of a choice that was not taken, nor
 * where the mask drops the element). A JSON array of {name, dimension, extent, count, first: {b, h, q_idx, kv_idx,
 * index}}; empty where there are none. By interpreting: slow. attention->o, lse, row_max and backend are ignored. Free
 * the text with attnjit_free. */
ATTNJIT_API attnjit_status attnjit_clamped_reads(attnjit_context* context, const attnjit_attention* attention,
                                                 const attnjit_row* rows, size_t num_rows, char** json);

typedef struct attnjit_explain_options {
  size_t struct_size;
  /* "sm_80", "sm_90a", ...: the CUDA kernels for this architecture, on any machine, wherever the tensors are said to
   * be. NULL: what is compiled where they are. */
  const char* arch;
  int dump; /* non-zero: the texts in between too: MLIR, LLVM IR and assembly, or MLIR, CUDA and PTX */
  /* The backward is explained. What belongs to it may be left out: attention->o and lse, grad_out, and dq, dk, dv and
   * captures that are not wanted. NULL: the forward is. */
  const attnjit_gradients* gradients;
} attnjit_explain_options;
#define ATTNJIT_EXPLAIN_OPTIONS_INIT {sizeof(attnjit_explain_options), NULL, 0, NULL}

/* What the compiler makes of a problem, as JSON: canonical text, hash, types, facts, times; of CUDA kernels registers,
 * shared memory, spills and warnings. CUDA binaries are kept in the disk cache, as attnjit_prepare's are. attention->o,
 * lse and row_max may be NULL. `options` may be NULL. Free the text with attnjit_free. */
ATTNJIT_API attnjit_status attnjit_explain(attnjit_context* context, const attnjit_attention* attention,
                                           const attnjit_explain_options* options, char** json);
/* Registered mods as a JSON array of {name, parameters, body, is_mask, summary}. Free it with attnjit_free. */
ATTNJIT_API attnjit_status attnjit_list_mods(attnjit_context* context, char** json);
/* Names that `score_mod` (and `mask_mod`, may be NULL) capture, as a JSON array of {name, rank}. */
ATTNJIT_API attnjit_status attnjit_captures(attnjit_context* context, const char* score_mod, const char* mask_mod,
                                            char** json);

/* ---- The disk cache --------------------------------------------------------------------------------------------- */

/* GPU binaries that are kept on disk for this user's processes, as JSON: {directory, max_bytes, bytes, entries: [{key,
 * bytes, last_used, about}]}, the least recently used first, times in seconds since the epoch; `about` says what a
 * binary was first made for, where it can be read. A non-zero `verify` adds `valid`; an entry that is damaged is
 * removed, and `removed` says whether that worked. ATTNJIT_ENVIRONMENT where the cache is off or its directory refused.
 * Free it with attnjit_free. */
ATTNJIT_API attnjit_status attnjit_cache_list(attnjit_context* context, int verify, char** json);
/* Removes every entry; `removed`, which may be NULL, receives their number. ATTNJIT_ENVIRONMENT as above, and where an
 * entry cannot be removed. */
ATTNJIT_API attnjit_status attnjit_cache_clear(attnjit_context* context, size_t* removed);

ATTNJIT_API void attnjit_free(char* text);

#ifdef __cplusplus
}
#endif

#endif
