/* A target that forks. It maps 2 MiB of private and 2 MiB of shared memory,
 * fills them, passes a userfaultfd for its address space over descriptor 3 and
 * then obeys one-letter commands on standard input, answering each with a line:
 *   f  fork a child that obeys c
 *   w  the parent writes page 1 of both regions
 *   c  the child writes page 2 of both regions
 *   q  end both
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define LEN (2u << 20)
#define PAGE 4096u

static void must(int ok, const char *what)
{
	if (!ok) {
		perror(what);
		exit(1);
	}
}

static void send_fd(int sock, int fd)
{
	char byte = 'u', control[CMSG_SPACE(sizeof fd)] = {0};
	struct iovec iov = {&byte, 1};
	struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof fd);
	memcpy(CMSG_DATA(c), &fd, sizeof fd);
	must(sendmsg(sock, &m, 0) == 1, "sendmsg");
}

int main(void)
{
	int mem = memfd_create("ram", 0);
	must(mem >= 0 && ftruncate(mem, LEN) == 0, "memfd");
	char *priv = mmap(0, LEN, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *shared = mmap(0, LEN, PROT_READ | PROT_WRITE, MAP_SHARED, mem, 0);
	must(priv != MAP_FAILED && shared != MAP_FAILED, "mmap");
	madvise(priv, LEN, MADV_NOHUGEPAGE);
	memset(priv, 'p', LEN);
	memset(shared, 's', LEN);

	int fd = syscall(SYS_userfaultfd, 02000000 | 04000); /* O_CLOEXEC | O_NONBLOCK */
	must(fd >= 0, "userfaultfd");
	send_fd(3, fd);
	close(fd);
	setvbuf(stdout, 0, _IOLBF, 0);
	printf("%p %p\n", (void *)priv, (void *)shared);

	int to[2], from[2];
	must(pipe(to) == 0 && pipe(from) == 0, "pipe");
	pid_t child = 0;
	for (int c; (c = getchar()) != EOF && c != 'q';) {
		char b = 0;
		switch (c) {
		case 'f':
			child = fork();
			must(child >= 0, "fork");
			if (child == 0) {
				close(to[1]);
				close(from[0]);
				while (read(to[0], &b, 1) == 1) {
					priv[2 * PAGE] = 'c';
					shared[2 * PAGE] = 'c';
					must(write(from[1], &b, 1) == 1, "write");
				}
				_exit(0);
			}
			break;
		case 'w':
			priv[PAGE] = 'w';
			shared[PAGE] = 'w';
			break;
		case 'c':
			must(write(to[1], "c", 1) == 1 && read(from[0], &b, 1) == 1, "child");
			break;
		default:
			continue;
		}
		puts("done");
	}
	close(to[1]);
	if (child > 0)
		waitpid(child, 0, 0);
	return 0;
}
