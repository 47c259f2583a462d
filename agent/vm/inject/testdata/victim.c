// A victim for the tests: one worker thread does what its kind says, over and
// over, and checks after each round that every register, the red zone, its
// signal mask and its alternate stack are what they were and that the system
// call answered what it should. The main thread obeys lines on stdin:
//   poke   let the worker finish a round (kinds that wait for an event)
//   check  print the number of rounds done, or what went wrong
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <immintrin.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static const char *kind;
static int event = -1;
static uint32_t word;
static volatile long rounds, handled, sent, eintr;
static char problem[256];
static volatile int broken;
static volatile pid_t worker_tid;

static void bad(const char *what, long a, long b) {
	if (!broken) {
		snprintf(problem, sizeof problem, "%s: %ld, wanted %ld", what, a, b);
		broken = 1;
	}
}

struct state {
	uint64_t gpr[10]; // rbx r12 r13 r14 r15 rdi rsi rdx r10 r8
	uint8_t ymm[16][32];
	uint64_t red[16];
	uint64_t rax;
};

// One system call with all registers set to known values, and read back.
// Compiled with -mno-red-zone: the red zone belongs to the test.
static long checked(long nr, long a, long b, long c, long d, long e) {
	static __thread uint64_t seed = 88172645463325252ull;
	struct state in, out;
	uint64_t *p = (uint64_t *)&in;
	for (size_t i = 0; i < sizeof in / 8; i++) {
		seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
		p[i] = seed;
	}
	in.gpr[5] = a, in.gpr[6] = b, in.gpr[7] = c, in.gpr[8] = d, in.gpr[9] = e;
	in.rax = nr;
	register struct state *pi __asm__("r9") = &in;
	register struct state *po __asm__("rax") = &out;
	__asm__ volatile(
		"push %%rbp\n\t"
		"mov %%rax, %%rbp\n\t"
		"mov 0(%%r9), %%rbx\n\tmov 8(%%r9), %%r12\n\tmov 16(%%r9), %%r13\n\tmov 24(%%r9), %%r14\n\t"
		"mov 32(%%r9), %%r15\n\tmov 40(%%r9), %%rdi\n\tmov 48(%%r9), %%rsi\n\tmov 56(%%r9), %%rdx\n\t"
		"mov 64(%%r9), %%r10\n\tmov 72(%%r9), %%r8\n\t"
#define L(n) "vmovdqu 80+32*" #n "(%%r9), %%ymm" #n "\n\t"
		L(0) L(1) L(2) L(3) L(4) L(5) L(6) L(7) L(8) L(9) L(10) L(11) L(12) L(13) L(14) L(15)
#define R(n) "mov 592+8*" #n "(%%r9), %%rax\n\tmov %%rax, -128+8*" #n "(%%rsp)\n\t"
		R(0) R(1) R(2) R(3) R(4) R(5) R(6) R(7) R(8) R(9) R(10) R(11) R(12) R(13) R(14) R(15)
		"mov 720(%%r9), %%rax\n\tsyscall\n\t"
		"mov %%rax, 720(%%rbp)\n\t"
#define S(n) "vmovdqu %%ymm" #n ", 80+32*" #n "(%%rbp)\n\t"
		S(0) S(1) S(2) S(3) S(4) S(5) S(6) S(7) S(8) S(9) S(10) S(11) S(12) S(13) S(14) S(15)
#define T(n) "mov -128+8*" #n "(%%rsp), %%rax\n\tmov %%rax, 592+8*" #n "(%%rbp)\n\t"
		T(0) T(1) T(2) T(3) T(4) T(5) T(6) T(7) T(8) T(9) T(10) T(11) T(12) T(13) T(14) T(15)
		"mov %%rbx, 0(%%rbp)\n\tmov %%r12, 8(%%rbp)\n\tmov %%r13, 16(%%rbp)\n\tmov %%r14, 24(%%rbp)\n\t"
		"mov %%r15, 32(%%rbp)\n\tmov %%rdi, 40(%%rbp)\n\tmov %%rsi, 48(%%rbp)\n\tmov %%rdx, 56(%%rbp)\n\t"
		"mov %%r10, 64(%%rbp)\n\tmov %%r8, 72(%%rbp)\n\t"
		"pop %%rbp\n\t"
		: "+r"(pi), "+r"(po)
		:
		: "rbx", "r12", "r13", "r14", "r15", "rdi", "rsi", "rdx", "r10", "r8", "rcx", "r11", "memory", "cc",
		  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
		  "xmm13", "xmm14", "xmm15");
	uint64_t *q = (uint64_t *)&out;
	for (size_t i = 0; i < offsetof(struct state, rax) / 8; i++)
		if (p[i] != q[i])
			bad("register or red zone word changed", i, -1);
	return out.rax;
}

// Vector and general registers that carry a sum for a long time.
static void spin(void) {
	uint64_t n = 3000000;
	uint64_t out[4], gpr = 0;
	__asm__ volatile(
		"vpxor %%ymm0, %%ymm0, %%ymm0\n\t"
		"vpcmpeqd %%ymm1, %%ymm1, %%ymm1\n\t"
		"vpxor %%ymm15, %%ymm15, %%ymm15\n\t"
		"mov %[n], %%rcx\n\t"
		"1: vpsubq %%ymm1, %%ymm0, %%ymm0\n\t"
		"vpaddq %%ymm0, %%ymm15, %%ymm15\n\t"
		"add %%rcx, %[g]\n\t"
		"mov %[g], -128(%%rsp)\n\tcmp %[g], -128(%%rsp)\n\tjne 2f\n\t"
		"dec %%rcx\n\tjnz 1b\n\t"
		"2: vmovdqu %%ymm15, (%[o])\n\tvzeroupper\n\t"
		: [g] "+r"(gpr)
		: [n] "r"(n), [o] "r"(out)
		: "rcx", "cc", "memory", "xmm0", "xmm1", "xmm15");
	uint64_t want = n * (n + 1) / 2;
	if (gpr != want)
		bad("sum in a general register", gpr, want);
	for (int i = 0; i < 4; i++)
		if (out[i] != want)
			bad("sum in a vector register", out[i], want);
}

static void on_signal(int s) {
	handled++;
	volatile char use[512];
	memset((char *)use, s, sizeof use);
	_mm256_zeroall(); // a handler may use vector registers
}

static long now_ms(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void expect_time(const char *what, long began, long least, long most) {
	long took = now_ms() - began;
	if (took < least || took > most)
		bad(what, took, least);
}

static void one_round(void) {
	long r;
	uint64_t v = 0;
	if (!strcmp(kind, "read")) {
		if ((r = checked(SYS_read, event, (long)&v, 8, 0, 0)) != 8 || v != 1)
			bad("read", r, 8);
	} else if (!strcmp(kind, "nanosleep") || !strcmp(kind, "nanosleep-same")) {
		int same = kind[9] != 0;
		struct timespec t = {0, 150000000}, rem = {9, 9};
		long began = now_ms();
		if ((r = checked(SYS_nanosleep, (long)&t, (long)(same ? &t : &rem), 0, 0, 0)) != 0)
			bad("nanosleep", r, 0);
		expect_time("nanosleep ms", began, 149, 5000);
	} else if (!strcmp(kind, "ppoll")) {
		struct pollfd f = {event, POLLIN, 0};
		if ((r = checked(SYS_ppoll, (long)&f, 1, 0, 0, 8)) != 1)
			bad("ppoll", r, 1);
		if (read(event, &v, 8) != 8)
			bad("read", errno, 8);
	} else if (!strcmp(kind, "ppoll-timeout")) {
		struct timespec t = {0, 150000000};
		sigset_t none;
		sigemptyset(&none);
		long began = now_ms();
		if ((r = checked(SYS_ppoll, 0, 0, (long)&t, (long)&none, 8)) != 0)
			bad("ppoll", r, 0);
		expect_time("ppoll ms", began, 149, 5000);
	} else if (!strcmp(kind, "futex")) {
		r = checked(SYS_futex, (long)&word, FUTEX_WAIT_PRIVATE, 0, 0, 0);
		if (r != 0 && r != -EAGAIN)
			bad("futex", r, 0);
		if (__atomic_exchange_n(&word, 0, __ATOMIC_SEQ_CST) != 1)
			bad("futex woke early", 0, 1);
	} else if (!strcmp(kind, "epoll")) {
		static int ep = -1;
		struct epoll_event e = {.events = EPOLLIN};
		if (ep < 0) {
			ep = epoll_create1(EPOLL_CLOEXEC);
			epoll_ctl(ep, EPOLL_CTL_ADD, event, &e);
		}
		while ((r = checked(SYS_epoll_wait, ep, (long)&e, 1, -1, 0)) == -EINTR)
			eintr++;
		if (r != 1)
			bad("epoll_wait", r, 1);
		if (read(event, &v, 8) != 8)
			bad("read", errno, 8);
	} else if (!strcmp(kind, "spin")) {
		spin();
	} else if (!strcmp(kind, "signals")) {
		spin();
		struct timespec t = {0, 1000};
		nanosleep(&t, 0);
	}
}

static void *work(void *unused) {
	stack_t alt = {.ss_sp = malloc(65536), .ss_size = 65536}, seen;
	sigset_t mask, now;
	sigaltstack(&alt, 0);
	sigemptyset(&mask);
	sigaddset(&mask, SIGUSR2);
	pthread_sigmask(SIG_SETMASK, &mask, 0);
	worker_tid = syscall(SYS_gettid);
	while (!broken) {
		one_round();
		sigaltstack(0, &seen);
		if (seen.ss_sp != alt.ss_sp || seen.ss_size != alt.ss_size || seen.ss_flags != 0)
			bad("alternate stack changed", (long)seen.ss_sp, (long)alt.ss_sp);
		sigemptyset(&now);
		pthread_sigmask(SIG_SETMASK, 0, &now);
		for (int s = 1; s < 64; s++)
			if (sigismember(&now, s) != sigismember(&mask, s))
				bad("signal mask changed, signal", s, 0);
		rounds++;
	}
	return unused;
}

// Real-time signals are queued: none may be lost or come twice.
static void *shower(void *arg) {
	pthread_t to = *(pthread_t *)arg;
	for (;;) {
		if (sent - handled < 50 && pthread_kill(to, SIGRTMIN + 1) == 0)
			sent++;
		struct timespec t = {0, 200000};
		nanosleep(&t, 0);
	}
	return 0;
}

// Answers system call nr, in every thread from now on, with an action.
static void forbid(int nr, uint32_t action) {
	struct sock_filter f[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, nr, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, action),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog p = {.len = sizeof f / sizeof *f, .filter = f};
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &p)) {
		perror("seccomp");
		exit(3);
	}
}

// victim KIND [kill|errno NR]
int main(int argc, char **argv) {
	if (argc != 2 && argc != 4)
		return 2;
	if (argc == 4)
		forbid(atoi(argv[3]), strcmp(argv[2], "kill") ? SECCOMP_RET_ERRNO | EPERM : SECCOMP_RET_KILL_PROCESS);
	kind = argv[1];
	event = eventfd(0, EFD_CLOEXEC);
	struct sigaction sa = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
	sigaction(SIGRTMIN + 1, &sa, 0);
	pthread_t w, s;
	pthread_create(&w, 0, work, 0);
	while (!worker_tid)
		usleep(1000);
	if (!strcmp(kind, "signals"))
		pthread_create(&s, 0, shower, &w);
	printf("worker %d\n", worker_tid);
	fflush(stdout);
	char line[64];
	while (fgets(line, sizeof line, stdin)) {
		if (!strncmp(line, "poke", 4)) {
			if (!strcmp(kind, "futex")) {
				__atomic_store_n(&word, 1, __ATOMIC_SEQ_CST);
				syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, 0, 0, 0);
			} else {
				uint64_t one = 1;
				if (write(event, &one, 8) != 8)
					bad("write", errno, 8);
			}
		}
		if (!strncmp(line, "check", 5)) {
			if (broken)
				printf("bad %s\n", problem);
			else
				printf("rounds %ld sent %ld handled %ld eintr %ld\n", rounds, sent, handled, eintr);
			fflush(stdout);
		}
	}
	return 0;
}
