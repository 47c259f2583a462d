// TCP echo on GD_ECHO=<port>: every byte comes back as it came. The address is
// GD_IP=<a.b.c.d>/<bits> (10.0.2.15/24, QEMU's user network, by default) with
// GD_GW as the default route.
#include "guestd.h"
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

static _Atomic u64 conns, bytes;
static bool active;

static void configure(const char *ifname, const char *cidr, const char *gateway) {
	int s = socket(AF_INET, SOCK_DGRAM, 0);
	char ip[64];
	snprintf(ip, sizeof ip, "%s", cidr);
	char *slash = strchr(ip, '/');
	int bits = 24;
	if (slash) {
		*slash = 0;
		bits = atoi(slash + 1);
	}
	struct ifreq r = {0};
	struct sockaddr_in a = {.sin_family = AF_INET};
	snprintf(r.ifr_name, IFNAMSIZ, "%s", ifname);
	inet_aton(ip, &a.sin_addr);
	memcpy(&r.ifr_addr, &a, sizeof a);
	int bad = ioctl(s, SIOCSIFADDR, &r);
	a.sin_addr.s_addr = htonl(bits ? ~0u << (32 - bits) : 0);
	memcpy(&r.ifr_netmask, &a, sizeof a);
	bad |= ioctl(s, SIOCSIFNETMASK, &r);
	r.ifr_flags = IFF_UP | IFF_RUNNING;
	bad |= ioctl(s, SIOCSIFFLAGS, &r);
	if (bad)
		say("FATAL network %s %s: %s", ifname, cidr, strerror(errno));
	if (gateway && *gateway) {
		struct rtentry rt = {.rt_flags = RTF_UP | RTF_GATEWAY};
		struct sockaddr_in *g = (void *)&rt.rt_gateway;
		rt.rt_dst.sa_family = rt.rt_genmask.sa_family = AF_INET;
		g->sin_family = AF_INET;
		inet_aton(gateway, &g->sin_addr);
		ioctl(s, SIOCADDRT, &rt);
	}
	close(s);
}

struct conn { int fd; size_t len, off; char buf[16384]; };

// One thread, level-triggered: a connection either waits to be read or, with
// bytes the peer did not take yet, to be written; never both, so the buffer is
// bounded and nothing is dropped.
static void *serve(void *arg) {
	int listener = (int)(intptr_t)arg, ep = epoll_create1(0), one = 1;
	struct epoll_event ev = {.events = EPOLLIN, .data.ptr = NULL};
	epoll_ctl(ep, EPOLL_CTL_ADD, listener, &ev);
	for (;;) {
		struct epoll_event evs[16];
		int n = epoll_wait(ep, evs, 16, -1);
		for (int i = 0; i < n; i++) {
			struct conn *c = evs[i].data.ptr;
			if (!c) {
				int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
				if (fd < 0 || !(c = malloc(sizeof *c))) {
					if (fd >= 0)
						close(fd);
					continue;
				}
				setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
				c->fd = fd, c->len = c->off = 0;
				ev = (struct epoll_event){.events = EPOLLIN, .data.ptr = c};
				epoll_ctl(ep, EPOLL_CTL_ADD, fd, &ev);
				conns++;
				continue;
			}
			if (c->off == c->len) {
				ssize_t k = read(c->fd, c->buf, sizeof c->buf);
				if (k <= 0 && (k == 0 || (errno != EAGAIN && errno != EINTR))) {
					close(c->fd);
					free(c);
					continue;
				}
				c->off = 0, c->len = k > 0 ? k : 0;
				bytes += c->len;
			}
			while (c->off < c->len) {
				ssize_t k = send(c->fd, c->buf + c->off, c->len - c->off, MSG_NOSIGNAL);
				if (k <= 0)
					break;
				c->off += k;
			}
			bool gone = c->off < c->len && errno != EAGAIN && errno != EINTR;
			if (gone) {
				close(c->fd);
				free(c);
				continue;
			}
			ev = (struct epoll_event){.events = c->off < c->len ? EPOLLOUT : EPOLLIN, .data.ptr = c};
			epoll_ctl(ep, EPOLL_CTL_MOD, c->fd, &ev);
		}
	}
	return NULL;
}

void net_start(void) {
	const char *port = param("ECHO", NULL);
	if (!port && !param("IP", NULL) && !param("SQL", NULL))
		return;
	configure("lo", "127.0.0.1/8", NULL);
	configure(param("IF", "eth0"), param("IP", "10.0.2.15/24"), param("GW", "10.0.2.2"));
	if (!port)
		return;
	int one = 1, s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
	setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(s, (void *)&a, sizeof a) || listen(s, 64)) {
		say("FATAL echo: %s", strerror(errno));
		return;
	}
	active = true;
	spawn(serve, (void *)(intptr_t)s, "echo");
	say("ECHO ready port=%s", port);
}

void net_report(void) {
	if (active)
		say("ECHO conns=%llu bytes=%llu", (unsigned long long)conns, (unsigned long long)bytes);
}
