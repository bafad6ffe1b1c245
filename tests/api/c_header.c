/* The header compiles as C and its initialisers are valid there. */
#include <attnjit/attnjit.h>
#include <stdio.h>

int main(void) {
  attnjit_context_options options = ATTNJIT_CONTEXT_OPTIONS_INIT;
  attnjit_attention attention = ATTNJIT_ATTENTION_INIT;
  attnjit_gradients gradients = ATTNJIT_GRADIENTS_INIT;
  attnjit_reference_gradients reference = ATTNJIT_REFERENCE_GRADIENTS_INIT;
  attnjit_explain_options explain = ATTNJIT_EXPLAIN_OPTIONS_INIT;
  attnjit_context* context = NULL;
  attnjit_plan* plan = NULL;
  options.num_threads = 1;
  if (attnjit_context_create(&options, &context) != ATTNJIT_OK) {
    fprintf(stderr, "%s\n", attnjit_last_error());
    return 1;
  }
  if (attnjit_prepare(context, &attention, &plan) != ATTNJIT_INVALID_ARGUMENT || plan != NULL) return 1;
  puts(attnjit_last_error());
  if (gradients.struct_size != sizeof(gradients) || reference.struct_size != sizeof(reference)) return 1;
  explain.gradients = &gradients;
  if (attnjit_prepare_backward(context, &attention, explain.gradients, NULL, &plan) != ATTNJIT_INVALID_ARGUMENT)
    return 1;
  puts(attnjit_last_error());
  attnjit_context_destroy(context);
  return 0;
}
