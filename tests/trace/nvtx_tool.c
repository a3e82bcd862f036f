/* A tool that NVTX loads (NVTX_INJECTION64_PATH): writes every range of every domain to the file
   NVTX_TOOL_LOG, one line per push ("thread > domain name") and pop ("thread < domain"). */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Constants and layouts of NVTX 3's public headers (nvToolsExt.h, nvtxDetail/nvtxTypes.h). */
enum { EXPORT_CALLBACKS = 1, MODULE_CORE2 = 5 };
enum { RANGE_PUSH = 4, RANGE_POP = 5, REGISTER_STRING = 10, DOMAIN_CREATE = 12 };

typedef struct {
  uint16_t version, size;
  uint32_t category;
  int32_t color_type;
  uint32_t color;
  int32_t payload_type, reserved;
  uint64_t payload;
  int32_t message_type;
  const char *message; /* as a registered string: what register_string returned */
} Attributes;

typedef struct {
  size_t size;
  int (*function_table)(int module, void ****table, unsigned *size);
} Callbacks;

static FILE *log_file;
static long thread(void) { return syscall(SYS_gettid); }

static void *domain_create(const char *name) { return strdup(name); }
static void *register_string(void *domain, const char *text) {
  (void)domain;
  return strdup(text);
}
static int range_push(const char *domain, const Attributes *attributes) {
  fprintf(log_file, "%ld > %s %s\n", thread(), domain, attributes->message);
  fflush(log_file);
  return 0;
}
static int range_pop(const char *domain) {
  fprintf(log_file, "%ld < %s\n", thread(), domain);
  fflush(log_file);
  return 0;
}

int InitializeInjectionNvtx2(const void *(*export_table)(uint32_t)) {
  const Callbacks *callbacks = export_table(EXPORT_CALLBACKS);
  void ***table;
  unsigned size;
  log_file = fopen(getenv("NVTX_TOOL_LOG"), "w");
  if (!log_file || !callbacks->function_table(MODULE_CORE2, &table, &size)) return 0;
  *table[DOMAIN_CREATE] = (void *)domain_create;
  *table[REGISTER_STRING] = (void *)register_string;
  *table[RANGE_PUSH] = (void *)range_push;
  *table[RANGE_POP] = (void *)range_pop;
  return 1;
}
