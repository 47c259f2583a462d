// The power button: GD_POWER=1 has the guest end when its machine's is pressed, as a
// manager's orderly shutdown does. What the writers have made safe by then is reported,
// everything else is written back, and the machine is switched off.
#include "guestd.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/input.h>
#include <poll.h>
#include <sys/reboot.h>
#include <termios.h>
#include <unistd.h>

enum { BUTTONS = 16 };

static void shut_down(void) {
	say("POWER pressed mono_us=%llu", (unsigned long long)(mono_ns() / 1000));
	files_report();
	log_report();
	sync();
	tcdrain(1);
	reboot(RB_POWER_OFF);
	fatal("power off");
}

static void *buttons(void *arg) {
	(void)arg;
	struct pollfd fds[BUTTONS];
	unsigned n = 0;
	// The nodes appear some time after the module is there.
	for (unsigned tries = 0; tries < 500 && !n; tries++, sleep_until(mono_ns() + 10000000ull))
		for (unsigned i = 0; i < BUTTONS; i++) {
			char path[64];
			snprintf(path, sizeof path, "/dev/input/event%u", i);
			int fd = open(path, O_RDONLY | O_CLOEXEC);
			if (fd >= 0)
				fds[n++] = (struct pollfd){.fd = fd, .events = POLLIN};
		}
	if (!n)
		fatal("find the power button");
	say("POWER ready buttons=%u", n);
	while (poll(fds, n, -1) >= 0 || errno == EINTR)
		for (unsigned i = 0; i < n; i++) {
			struct input_event e;
			if (fds[i].revents & POLLIN && read(fds[i].fd, &e, sizeof e) == sizeof e && e.type == EV_KEY &&
			    e.code == KEY_POWER && e.value)
				shut_down();
		}
	fatal("wait for the power button");
}

void power_start(void) {
	if (!param_u64("POWER", 0))
		return;
	load_named("on:power");
	spawn(buttons, NULL, "power");
}
