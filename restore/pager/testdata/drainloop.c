/*
 * The limit of a drain: one thread, UFFDIO_COPY of CHUNK bytes from a mapped file
 * of raw pages into fresh memory, nothing else. Prints bytes and nanoseconds.
 * usage: drainloop FILE CHUNK
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static void die(const char *what) { perror(what); exit(1); }

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	unsigned long chunk = strtoul(argv[2], 0, 0);
	int fd = open(argv[1], O_RDONLY);
	struct stat st;
	if (fd < 0 || fstat(fd, &st))
		die(argv[1]);
	unsigned long bytes = st.st_size & ~(chunk - 1);
	char *src = mmap(0, bytes, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0);
	char *dst = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (src == MAP_FAILED || dst == MAP_FAILED)
		die("mmap");
	int u = syscall(SYS_userfaultfd, O_CLOEXEC);
	struct uffdio_api api = { .api = UFFD_API };
	if (u < 0 || ioctl(u, UFFDIO_API, &api))
		die("userfaultfd");
	struct uffdio_register reg = { { (unsigned long)dst, bytes }, UFFDIO_REGISTER_MODE_MISSING };
	if (ioctl(u, UFFDIO_REGISTER, &reg))
		die("register");
	struct timespec a, b;
	clock_gettime(CLOCK_MONOTONIC, &a);
	for (unsigned long o = 0; o < bytes; o += chunk) {
		struct uffdio_copy c = { (unsigned long)dst + o, (unsigned long)src + o, chunk };
		if (ioctl(u, UFFDIO_COPY, &c))
			die("copy");
	}
	clock_gettime(CLOCK_MONOTONIC, &b);
	printf("%lu %ld\n", bytes, (b.tv_sec - a.tv_sec) * 1000000000L + b.tv_nsec - a.tv_nsec);
	return 0;
}
