/* The same library from C: one query that attends to three keys, the last of them masked. */
#include <attnjit/attnjit.h>
#include <stdio.h>
#include <stdlib.h>

int main(void) {
  float q[2] = {1, 2}, k[6] = {1, 0, 0, 1, 1, 1}, v[3] = {10, 20, 30}, o[1];
  int64_t q_shape[4] = {1, 1, 1, 2}, k_shape[4] = {1, 1, 3, 2}, v_shape[4] = {1, 1, 3, 1}, o_shape[4] = {1, 1, 1, 1};
  const DLDevice cpu = {kDLCPU, 0};
  const DLDataType f32 = {kDLFloat, 32, 1};
  DLTensor tq = {q, cpu, 4, f32, q_shape, NULL, 0}, tk = {k, cpu, 4, f32, k_shape, NULL, 0};
  DLTensor tv = {v, cpu, 4, f32, v_shape, NULL, 0}, to = {o, cpu, 4, f32, o_shape, NULL, 0};
  attnjit_attention attention = ATTNJIT_ATTENTION_INIT;
  attnjit_context* context = NULL;
  attnjit_plan* plan = NULL;
  void* workspace = NULL;
  attnjit_status status;

  attention.q = &tq;
  attention.k = &tk;
  attention.v = &tv;
  attention.o = &to;
  attention.mask_mod = "kv_idx < 2";
  status = attnjit_context_create(NULL, &context);
  if (status == ATTNJIT_OK) status = attnjit_prepare(context, &attention, &plan);
  if (status == ATTNJIT_OK) {
    const size_t size = attnjit_plan_workspace_size(plan);
    workspace = aligned_alloc(64, (size + 63) / 64 * 64 + 64);
    status = attnjit_run(plan, &attention, workspace, size, NULL);
  }
  if (status != ATTNJIT_OK) {
    fprintf(stderr, "%s: %s\n", attnjit_status_name(status), attnjit_last_error());
  } else {
    printf("o = %g\n", o[0]); /* 10 p + 20 (1 - p), p = 1 / (1 + exp(1 / sqrt(2))) */
    if (o[0] < 16.69f || o[0] > 16.71f) status = ATTNJIT_INTERNAL;
  }
  free(workspace);
  attnjit_plan_destroy(plan);
  attnjit_context_destroy(context);
  return status == ATTNJIT_OK ? 0 : 1;
}
