// init: mounts, modules, and the threads that the command line asks for.
#include "guestd.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/rtc.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

static int console = 1;
static char cmdline[4096];
static pthread_mutex_t say_lock = PTHREAD_MUTEX_INITIALIZER;

const char *param(const char *name, const char *fallback) {
	static struct { char key[32], val[256]; } known[64];
	static unsigned n;
	static bool parsed;
	if (!parsed) { // first called by main before there are threads
		parsed = true;
		char *save, copy[sizeof cmdline];
		snprintf(copy, sizeof copy, "%s", cmdline);
		for (char *w = strtok_r(copy, " \n", &save); w; w = strtok_r(NULL, " \n", &save)) {
			char *eq = strchr(w, '=');
			if (strncmp(w, "GD_", 3) || !eq || n == 64)
				continue;
			*eq = 0;
			snprintf(known[n].key, sizeof known[n].key, "%s", w + 3);
			snprintf(known[n].val, sizeof known[n].val, "%s", eq + 1);
			n++;
		}
	}
	for (unsigned i = n; i-- > 0;) // the last one wins, as everywhere
		if (!strcmp(known[i].key, name))
			return known[i].val;
	return fallback;
}

u64 param_u64(const char *name, u64 fallback) {
	const char *v = param(name, NULL);
	return v && *v ? strtoull(v, NULL, 0) : fallback;
}

void say(const char *fmt, ...) {
	char line[512];
	va_list ap;
	va_start(ap, fmt);
	int n = vsnprintf(line, sizeof line - 8, fmt, ap);
	va_end(ap);
	if (n > (int)sizeof line - 9)
		n = sizeof line - 9;
	u32 h = 2166136261u; // FNV-1a, folded to 16 bits
	for (int i = 0; i < n; i++)
		h = (h ^ (unsigned char)line[i]) * 16777619u;
	n += snprintf(line + n, 8, " *%04x\n", (h ^ h >> 16) & 0xffff);
	pthread_mutex_lock(&say_lock);
	for (int done = 0; done < n;) {
		ssize_t k = write(console, line + done, n - done);
		if (k > 0)
			done += k;
		else if (errno != EINTR && errno != EAGAIN)
			break;
	}
	pthread_mutex_unlock(&say_lock);
}

void fatal(const char *what) {
	say("FATAL %s: %s", what, strerror(errno));
	tcdrain(console);
	sync();
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

static u64 clock_ns(clockid_t c) {
	struct timespec t;
	clock_gettime(c, &t);
	return (u64)t.tv_sec * 1000000000ull + t.tv_nsec;
}
u64 mono_ns(void) { return clock_ns(CLOCK_MONOTONIC); }
u64 real_ns(void) { return clock_ns(CLOCK_REALTIME); }

void sleep_until(u64 ns) {
	struct timespec t = {ns / 1000000000ull, ns % 1000000000ull};
	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR)
		;
}

void spawn(void *(*fn)(void *), void *arg, const char *name) {
	pthread_t t;
	if ((errno = pthread_create(&t, NULL, fn, arg)))
		fatal(name);
	pthread_setname_np(t, name);
	pthread_detach(t);
}

void pin(unsigned cpu) {
	cpu_set_t set;
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	sched_setaffinity(0, sizeof set, &set);
}

// The ticker numbers lines on the console: a gap or a step back in them is a
// guest that lost or repeated time. Next to each number stand the guest's
// clocks; the RTC is read once a second only, since each read costs many port
// accesses (every one an exit under KVM).
static void *ticker(void *arg) {
	(void)arg;
	u64 every = param_u64("TICK", 100) * 1000000ull, next = mono_ns(), rtc_next = 0;
	int rtc = open("/dev/rtc0", O_RDONLY);
	char rtc_text[64] = "-";
	for (u64 n = 0;; n++) {
		u64 now = mono_ns();
		if (rtc >= 0 && now >= rtc_next) {
			struct rtc_time r;
			if (!ioctl(rtc, RTC_RD_TIME, &r))
				snprintf(rtc_text, sizeof rtc_text, "%04d-%02d-%02dT%02d:%02d:%02dZ", r.tm_year + 1900,
					 r.tm_mon + 1, r.tm_mday, r.tm_hour, r.tm_min, r.tm_sec);
			rtc_next = now + 1000000000ull;
		} else
			strcpy(rtc_text, "-");
		say("TICK %llu mono_us=%llu real_us=%llu rtc=%s", (unsigned long long)n,
		    (unsigned long long)(mono_ns() / 1000), (unsigned long long)(real_ns() / 1000), rtc_text);
		// No catching up in a burst: after a stall the rhythm starts anew.
		next = next + every > mono_ns() ? next + every : mono_ns() + every;
		sleep_until(next);
	}
	return NULL;
}

static void *reporter(void *arg) {
	(void)arg;
	u64 every = param_u64("REPORT", 250) * 1000000ull, next = mono_ns(), slow = 0;
	for (;;) {
		ws_report();
		if (mono_ns() >= slow) {
			slow = mono_ns() + 1000000000ull;
			files_report();
			log_report();
			net_report();
			spin_report();
		}
		next = next + every > mono_ns() ? next + every : mono_ns() + every;
		sleep_until(next);
	}
	return NULL;
}

// run starts a program on a terminal. owner makes that its controlling terminal,
// for job control; never of the console, which would hang up for all of us when
// the program ends.
static pid_t run(const char *path, const char *tty, bool owner, char *const argv[]) {
	pid_t pid = fork();
	if (pid)
		return pid;
	setsid();
	int fd = open(tty, O_RDWR | O_NOCTTY);
	if (fd < 0)
		_exit(127);
	for (int i = 0; i < 3; i++)
		dup2(fd, i);
	if (owner)
		ioctl(0, TIOCSCTTY, 0);
	char *const env[] = {"PATH=/bin", "HOME=/", "TERM=vt100", NULL};
	execve(path, argv, env);
	_exit(127);
}

int main(void) {
	mkdir("/proc", 0755), mkdir("/sys", 0755), mkdir("/dev", 0755), mkdir("/tmp", 0755), mkdir("/mnt", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	mount("dev", "/dev", "devtmpfs", 0, NULL);
	int fd = open("/proc/cmdline", O_RDONLY);
	ssize_t n = fd >= 0 ? read(fd, cmdline, sizeof cmdline - 1) : 0;
	cmdline[n > 0 ? n : 0] = 0;
	close(fd);
	param("", NULL);
	char tty[64];
	snprintf(tty, sizeof tty, "/dev/%s", param("TTY", "ttyS0"));
	if ((fd = open(tty, O_RDWR | O_NOCTTY)) >= 0) {
		console = fd;
		struct termios t;
		if (!tcgetattr(fd, &t)) {
			cfmakeraw(&t); // no \r before \n, no echo of what the host sends
			tcsetattr(fd, TCSANOW, &t);
		}
	}
	boot_modules();
	struct utsname u;
	uname(&u);
	say("INIT up kernel=%s cpus=%ld mono_us=%llu", u.release, sysconf(_SC_NPROCESSORS_ONLN),
	    (unsigned long long)(mono_ns() / 1000));
	spin_init();
	spawn(ticker, NULL, "tick");
	net_start();
	disk_start();
	log_audit();
	files_start();
	log_start();
	ws_start();
	spin_start();
	ga_start();
	power_start();
	say("READY mono_us=%llu", (unsigned long long)(mono_ns() / 1000));
	spawn(reporter, NULL, "report");

	pid_t job = 0;
	if (param("RUN", NULL)) { // a script, usually on a disk mounted at /mnt
		char path[256];
		snprintf(path, sizeof path, "%s", param("RUN", ""));
		job = run("/bin/busybox", tty, false, (char *[]){"sh", path, NULL});
	}
	pid_t database = 0;
	if (param("SQL", NULL)) { // the database server, on the disk mounted at /mnt
		char port[16];
		snprintf(port, sizeof port, "%s", param("SQL", ""));
		database = run("/bin/sqld", tty, false, (char *[]){"sqld", port, "/mnt/sql", NULL});
	}
	pid_t shell = 0;
	for (;;) {
		if (param("SH", NULL) && !shell) {
			char own[64];
			snprintf(own, sizeof own, "/dev/%s", param("SH", "ttyS1"));
			shell = run("/bin/busybox", own, strcmp(own, tty) != 0, (char *[]){"sh", "-i", NULL});
		}
		int status;
		pid_t pid = wait(&status);
		if (pid < 0)
			pause(); // no children: only the threads live
		if (pid == job && job)
			say("RUN done status=%d", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
		if (pid == database && database)
			say("FATAL sqld: ended with status %d", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
		if (pid == shell)
			shell = 0;
	}
}
