// SPDX-License-Identifier: Apache-2.0
//
// cwp: what a userfaultfd fault costs at the least.
//
// A target process touches every page of its memory once, one after the other,
// and measures each touch; a server process does the least a checkpoint or a
// lazy restore must do for each fault, in C, with the same system calls as
// ckagent:
//   write    read the message, copy the page out (process_vm_readv), check that
//            it is still armed (PAGEMAP_SCAN), unprotect and wake
//   missing  read the message, UFFDIO_COPY
//   drain    no faults: UFFDIO_COPY of a file in large pieces, one thread
// Its figures are the limit that a fault service written in any language is to
// be held against on the same machine.
//
// Usage: cwp [-k write|missing|drain] [-w poll|block|spin] [-s MICROSECONDS]
//            [-n PAGES] [-g GAP_NS] [-r RUNS] [-x] [-R] [-f FILE] [-c CHUNK]
//   -w  how the server waits: poll and then read; a blocking read; reading in a
//       loop for -s microseconds after each fault before it blocks in poll
//   -g  let the target pause that long between two touches (a guest does
//       something else meanwhile)
//   -x  leave out the PAGEMAP_SCAN check
//   -R  touch the pages in random order (the same each time) instead of
//       one after the other
//   -f, -c  what to drain, and how many bytes at a time (524288)
//   -T  be only the target: pass the userfaultfd over descriptor 3, print the
//       address, start at a byte on standard input (used by the Go benchmarks)
//   -M  with -T: make no userfaultfd; who measures brings one
// Output: one line per run, key=value.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <linux/userfaultfd.h>

#define PAGE 4096ul

// linux/fs.h of Linux 6.7; older headers lack it.
struct scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
struct scan_region {
	uint64_t start, end, categories;
};
#define SCAN _IOWR('f', 16, struct scan_arg)
#define IS_WRITTEN (1u << 1)
#define IS_PRESENT (1u << 3)
#define IS_SWAPPED (1u << 4)

enum { WRITE, MISSING, DRAIN };
enum { POLL, BLOCK, SPIN };

static int kind = WRITE, way = POLL, check = 1, target_only, random_order, bare;
static long pages = 20000, gap_ns, spin_us = 50, runs = 1, chunk = 524288;
static const char *drain_file;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static int compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
	return x < y ? -1 : x > y;
}

static void pass_fd(int sock, int fd)
{
	char byte = 'u', control[CMSG_SPACE(sizeof fd)] = {0};
	struct iovec iov = {&byte, 1};
	struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof fd);
	memcpy(CMSG_DATA(c), &fd, sizeof fd);
	if (sendmsg(sock, &m, 0) != 1)
		die("sendmsg");
}

static int take_fd(int sock)
{
	char byte, control[CMSG_SPACE(sizeof(int))];
	struct iovec iov = {&byte, 1};
	struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	int fd;
	if (recvmsg(sock, &m, MSG_CMSG_CLOEXEC) != 1 || !CMSG_FIRSTHDR(&m))
		die("recvmsg");
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof fd);
	return fd;
}

// The target: touches each page once when told to, and prints what it saw.
static void target(int sock, int start_fd, int out_fd)
{
	FILE *out = fdopen(out_fd, "w");
	char *m = mmap(0, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t *took = malloc(pages * sizeof *took);
	if (!out || m == MAP_FAILED || !took)
		die("target");
	memset(took, 1, pages * sizeof *took);
	madvise(m, pages * PAGE, MADV_NOHUGEPAGE);
	if (kind == WRITE)
		for (long i = 0; i < pages; i++)
			m[i * PAGE] = 1;
	uint32_t *order = malloc(pages * sizeof *order);
	if (!order)
		die("target");
	for (long i = 0; i < pages; i++)
		order[i] = i;
	if (random_order) { // Fisher-Yates by a xorshift generator
		uint64_t x = 88172645463325252ull;
		for (long i = pages - 1; i > 0; i--) {
			x ^= x << 13, x ^= x >> 7, x ^= x << 17;
			long j = x % (i + 1);
			uint32_t t = order[i];
			order[i] = order[j], order[j] = t;
		}
	}
	if (!bare) {
		int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
		if (fd < 0)
			die("userfaultfd");
		pass_fd(sock, fd);
		close(fd);
	}
	fprintf(out, "%p\n", (void *)m);
	fflush(out);
	char b;
	if (read(start_fd, &b, 1) != 1)
		exit(1);
	uint64_t begin = now();
	for (long i = 0; i < pages; i++) {
		if (gap_ns)
			for (uint64_t until = now() + gap_ns; now() < until;)
				;
		volatile char *at = m + order[i] * PAGE;
		uint64_t t = now();
		if (kind == WRITE)
			*at = 2;
		else
			(void)*at;
		took[i] = now() - t;
	}
	uint64_t total = now() - begin;
	qsort(took, pages, sizeof *took, compare);
	fprintf(out, "faults=%ld median_ns=%lu p99_ns=%lu max_ns=%lu total_ns=%lu\n", pages, took[pages / 2],
		took[pages * 99 / 100], took[pages - 1], total);
	fflush(out);
	_exit(0); // not exit: the parent's unwritten output is not ours to write
}

static void arm(int uffd, uint64_t base)
{
	struct uffdio_api api = {.api = UFFD_API, .features = kind == WRITE ? UFFD_FEATURE_PAGEFAULT_FLAG_WP : 0};
	if (ioctl(uffd, UFFDIO_API, &api))
		die("UFFDIO_API");
	struct uffdio_register reg = {.range = {base, pages * PAGE},
		.mode = kind == WRITE ? UFFDIO_REGISTER_MODE_WP : UFFDIO_REGISTER_MODE_MISSING};
	if (ioctl(uffd, UFFDIO_REGISTER, &reg))
		die("UFFDIO_REGISTER");
	if (kind == WRITE) {
		struct uffdio_writeprotect wp = {{base, pages * PAGE}, UFFDIO_WRITEPROTECT_MODE_WP};
		if (ioctl(uffd, UFFDIO_WRITEPROTECT, &wp))
			die("arm");
	}
	if (way == BLOCK && fcntl(uffd, F_SETFL, 0))
		die("fcntl");
}

static void loop(int uffd, int pm, pid_t pid)
{
	static char page[PAGE];
	for (long done = 0; done < pages;) {
		struct uffd_msg msg;
		ssize_t n;
		uint64_t until = 0;
		for (;;) {
			n = read(uffd, &msg, sizeof msg);
			if (n == sizeof msg)
				break;
			if (errno != EAGAIN && errno != EINTR)
				die("read");
			if (way == SPIN) {
				if (!until)
					until = now() + spin_us * 1000;
				if (now() < until)
					continue;
			}
			struct pollfd p = {uffd, POLLIN, 0};
			if (poll(&p, 1, -1) < 0 && errno != EINTR)
				die("poll");
		}
		uint64_t at = msg.arg.pagefault.address & ~(PAGE - 1);
		if (kind == WRITE) {
			struct iovec to = {page, PAGE}, from = {(void *)at, PAGE};
			if (process_vm_readv(pid, &to, 1, &from, 1, 0) != (ssize_t)PAGE)
				die("process_vm_readv");
			if (check) {
				struct scan_region r = {0};
				struct scan_arg a = {.size = sizeof a, .start = at, .end = at + PAGE, .vec = (uintptr_t)&r, .vec_len = 1,
					.category_inverted = IS_WRITTEN, .category_mask = IS_WRITTEN,
					.category_anyof_mask = IS_PRESENT | IS_SWAPPED, .return_mask = IS_WRITTEN};
				if (ioctl(pm, SCAN, &a) != 1)
					die("PAGEMAP_SCAN");
			}
			struct uffdio_writeprotect wp = {{at, PAGE}, 0};
			if (ioctl(uffd, UFFDIO_WRITEPROTECT, &wp))
				die("unprotect");
		} else {
			struct uffdio_copy c = {.dst = at, .src = (uintptr_t)page, .len = PAGE};
			if (ioctl(uffd, UFFDIO_COPY, &c))
				die("UFFDIO_COPY");
		}
		done++;
	}
}

static void run(void)
{
	int pair[2], start[2], out[2];
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) || pipe(start) || pipe(out))
		die("pipe");
	fflush(stdout);
	pid_t pid = fork();
	if (pid < 0)
		die("fork");
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		target(pair[0], start[0], out[1]);
	}
	int uffd = take_fd(pair[1]);
	char line[256];
	FILE *answer = fdopen(out[0], "r");
	void *base;
	if (!answer || !fgets(line, sizeof line, answer) || sscanf(line, "%p", &base) != 1)
		die("target");
	snprintf(line, sizeof line, "/proc/%d/pagemap", pid);
	int pm = open(line, O_RDONLY | O_CLOEXEC);
	if (pm < 0)
		die(line);
	arm(uffd, (uintptr_t)base);
	if (write(start[1], "g", 1) != 1)
		die("start");
	loop(uffd, pm, pid);
	if (!fgets(line, sizeof line, answer))
		die("result");
	static const char *kinds[] = {"write", "missing"}, *ways[] = {"poll", "block", "spin"};
	printf("kind=%s wait=%s check=%d gap_ns=%ld %s", kinds[kind], ways[way], kind == WRITE && check, gap_ns, line);
	fclose(answer);
	close(pm);
	close(uffd);
	close(pair[0]);
	close(pair[1]);
	close(start[0]);
	close(start[1]);
	close(out[1]);
	waitpid(pid, 0, 0);
}

// The limit of a drain: nothing but the copies, from a file that is in memory.
static void drain(void)
{
	int fd = open(drain_file, O_RDONLY | O_CLOEXEC);
	struct stat st;
	if (fd < 0 || fstat(fd, &st))
		die(drain_file);
	unsigned long bytes = st.st_size / chunk * chunk;
	char *src = mmap(0, bytes, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0);
	char *dst = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (src == MAP_FAILED || dst == MAP_FAILED)
		die("mmap");
	int uffd = syscall(SYS_userfaultfd, O_CLOEXEC);
	struct uffdio_api api = {.api = UFFD_API};
	struct uffdio_register reg = {.range = {(uintptr_t)dst, bytes}, .mode = UFFDIO_REGISTER_MODE_MISSING};
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &reg))
		die("userfaultfd");
	uint64_t begin = now();
	for (unsigned long o = 0; o < bytes; o += chunk) {
		struct uffdio_copy c = {.dst = (uintptr_t)dst + o, .src = (uintptr_t)src + o, .len = chunk};
		if (ioctl(uffd, UFFDIO_COPY, &c))
			die("UFFDIO_COPY");
	}
	uint64_t took = now() - begin;
	printf("kind=drain bytes=%lu chunk=%ld total_ns=%lu\n", bytes, chunk, took);
	close(uffd);
	munmap(src, bytes);
	munmap(dst, bytes);
	close(fd);
}

int main(int argc, char **argv)
{
	for (int c; (c = getopt(argc, argv, "k:w:s:n:g:r:f:c:xTRM")) != -1;) {
		switch (c) {
		case 'k': kind = !strcmp(optarg, "missing") ? MISSING : !strcmp(optarg, "drain") ? DRAIN : WRITE; break;
		case 'w': way = !strcmp(optarg, "block") ? BLOCK : !strcmp(optarg, "spin") ? SPIN : POLL; break;
		case 's': spin_us = atol(optarg); break;
		case 'n': pages = atol(optarg); break;
		case 'g': gap_ns = atol(optarg); break;
		case 'r': runs = atol(optarg); break;
		case 'x': check = 0; break;
		case 'T': target_only = 1; break;
		case 'R': random_order = 1; break;
		case 'M': bare = 1; break;
		case 'f': drain_file = optarg; break;
		case 'c': chunk = atol(optarg); break;
		default:
			fprintf(stderr, "usage: %s [-k write|missing|drain] [-w poll|block|spin] [-s us] [-n pages] [-g ns] [-r runs] [-f file] [-c bytes] [-xRTM]\n", argv[0]);
			return 2;
		}
	}
	if (pages < 1 || runs < 1 || gap_ns < 0 || spin_us < 0 || chunk < (long)PAGE || chunk % PAGE || (kind == DRAIN && !drain_file)) {
		fprintf(stderr, "cwp: bad number\n");
		return 2;
	}
	if (target_only)
		target(3, 0, 1);
	for (long i = 0; i < runs; i++) {
		if (kind == DRAIN)
			drain();
		else
			run();
	}
	return 0;
}
