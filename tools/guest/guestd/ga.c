// A guest agent that speaks qemu-ga's protocol on its virtio-serial port, as far as
// ckagent asks: sync, freeze and thaw of file systems, the clock. GD_GA=1 starts it;
// GD_GA_SLOW=<ms> delays the freeze, GD_GA_MUTE=1 answers nothing at all.
//
// A frozen guest is one whose file systems take no writes: the disk at /mnt, if one
// is mounted, is frozen with FIFREEZE, and the file writer (files.c) stands still.
#include "guestd.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

_Atomic bool ga_frozen;

static int open_port(void) {
	DIR *d = opendir("/sys/class/virtio-ports");
	int fd = -1;
	for (struct dirent *e; d && fd < 0 && (e = readdir(d));) {
		char path[320], name[64] = "";
		snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", e->d_name);
		int n = open(path, O_RDONLY);
		if (n < 0)
			continue;
		if (read(n, name, sizeof name - 1) > 0 && !strncmp(name, "org.qemu.guest_agent.0", 22)) {
			snprintf(path, sizeof path, "/dev/%s", e->d_name);
			fd = open(path, O_RDWR);
		}
		close(n);
	}
	if (d)
		closedir(d);
	return fd;
}

// number reads the digits behind "key": in a line of JSON.
static long long number(const char *line, const char *key) {
	const char *p = strstr(line, key);
	return p && (p = strchr(p + strlen(key), ':')) ? strtoll(p + 1, NULL, 10) : 0;
}

static int disk(unsigned long request) {
	int fd = open("/mnt", O_RDONLY | O_DIRECTORY), n = 0;
	if (fd >= 0) {
		n = param("DISK", NULL) && !ioctl(fd, request, 0);
		close(fd);
	}
	return n;
}

static void answer(int fd, const char *line) {
	char out[256] = "{\"return\": {}}\n";
	if (strstr(line, "\"guest-sync-delimited\""))
		snprintf(out, sizeof out, "\xff{\"return\": %lld}\n", number(line, "\"id\""));
	else if (strstr(line, "\"guest-fsfreeze-freeze\"")) {
		u64 until = mono_ns() + param_u64("GA_SLOW", 0) * 1000000ull;
		sleep_until(until);
		int n = 1 + disk(FIFREEZE); // the file writer's directory counts as one
		ga_frozen = true;
		say("GA frozen mono_us=%llu", (unsigned long long)(mono_ns() / 1000));
		snprintf(out, sizeof out, "{\"return\": %d}\n", n);
	} else if (strstr(line, "\"guest-fsfreeze-thaw\"")) {
		int n = ga_frozen ? 1 + disk(FITHAW) : 0;
		ga_frozen = false;
		say("GA thawed n=%d mono_us=%llu", n, (unsigned long long)(mono_ns() / 1000));
		snprintf(out, sizeof out, "{\"return\": %d}\n", n);
	} else if (strstr(line, "\"guest-fsfreeze-status\""))
		snprintf(out, sizeof out, "{\"return\": \"%s\"}\n", ga_frozen ? "frozen" : "thawed");
	else if (strstr(line, "\"guest-get-time\""))
		snprintf(out, sizeof out, "{\"return\": %llu}\n", (unsigned long long)real_ns());
	else if (strstr(line, "\"guest-set-time\"")) {
		long long ns = number(line, "\"time\"");
		struct timespec t = {ns / 1000000000, ns % 1000000000};
		if (clock_settime(CLOCK_REALTIME, &t))
			snprintf(out, sizeof out, "{\"error\": {\"class\": \"GenericError\", \"desc\": \"%s\"}}\n", strerror(errno));
	} else if (!strstr(line, "\"guest-ping\""))
		snprintf(out, sizeof out, "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"unknown command\"}}\n");
	for (size_t done = 0, len = strlen(out); done < len;) {
		ssize_t k = write(fd, out + done, len - done);
		if (k <= 0)
			return; // nobody listens any more
		done += k;
	}
}

static void *serve(void *arg) {
	(void)arg;
	int fd = -1;
	// virtio probes in the background; the port appears within moments.
	for (unsigned i = 0; i < 500 && (fd = open_port()) < 0; i++)
		sleep_until(mono_ns() + 10000000ull);
	if (fd < 0)
		fatal("guest agent port");
	say("GA up");
	bool mute = param_u64("GA_MUTE", 0);
	char line[1024];
	size_t n = 0;
	for (;;) {
		char c;
		ssize_t k = read(fd, &c, 1);
		if (k <= 0) { // nobody is connected
			sleep_until(mono_ns() + 20 * 1000000ull);
			n = 0;
			continue;
		}
		if ((unsigned char)c == 0xff) // the sign to forget what came before
			n = 0;
		else if (c != '\n') {
			if (n < sizeof line - 1)
				line[n++] = c;
		} else {
			line[n] = 0;
			n = 0;
			if (!mute)
				answer(fd, line);
		}
	}
	return NULL;
}

void ga_start(void) {
	if (param_u64("GA", 0))
		spawn(serve, NULL, "ga");
}
