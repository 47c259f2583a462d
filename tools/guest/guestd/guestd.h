// guestd: the self-checking workload inside the Linux guest, shared declarations.
//
// One static program is both init (PID 1) and workload. Everything it does is
// chosen by GD_* words on the kernel command line; see README.md beside it.
#ifndef GUESTD_H
#define GUESTD_H
#define _GNU_SOURCE
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t u64;
typedef uint32_t u32;

#define PAGE 4096u

// param: the value of GD_<name> on the kernel command line, or fallback.
const char *param(const char *name, const char *fallback);
u64 param_u64(const char *name, u64 fallback);

// say prints one report line: the text, a blank, '*', four hex digits of
// checksum, newline; in one write, so that lines of two threads never mix. The
// checksum lets a reader tell a report cut in two by a crash from a whole one.
void say(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void fatal(const char *what) __attribute__((noreturn)); // says FATAL what: errno, stops the machine

u64 mono_ns(void);
u64 real_ns(void);
void sleep_until(u64 mono_deadline_ns);
void spawn(void *(*fn)(void *), void *arg, const char *name);
void pin(unsigned cpu); // pins the calling thread; silently stays put on a CPU that is not there

// mix64: the finalizer of splitmix64 (Steele, Lea, Flood 2014): a bijection on
// 64 bits whose every output bit depends on every input bit.
static inline u64 mix64(u64 x) {
	x ^= x >> 30; x *= 0xbf58476d1ce4e5b9ull;
	x ^= x >> 27; x *= 0x94d049bb133111ebull;
	return x ^ (x >> 31);
}

static inline u64 rdtsc(void) {
	u32 lo, hi;
	__asm__ volatile("rdtsc" : "=a"(lo), "=d"(hi));
	return (u64)hi << 32 | lo;
}

void boot_modules(void); // modules.c: loads what the PCI devices found ask for
void load_named(const char *key); // modules.c: loads what one line of the list is for
void disk_start(void);   // disk.c
void log_start(void);    // log.c
void log_report(void);
void log_audit(void);    // GD_LOGCHECK: says what is on the disk, unmounts it and powers off
void net_start(void);    // net.c
void files_start(void);  // files.c
void spin_init(void);    // spin.c: before any thread that beats
void spin_start(void);
void beat(long cpu);     // shows the host that this vCPU runs, if it is the spinning one and time for it
void ws_start(void);     // ws.c
void ga_start(void);     // ga.c
void power_start(void);  // power.c
extern _Atomic bool ga_frozen; // file systems are frozen: whoever writes files waits
void ws_report(void);    // prints the WS line; called by the reporter
void files_report(void);
void net_report(void);
void spin_report(void);
#endif
