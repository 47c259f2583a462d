// The gap measurer: one thread that never sleeps and looks at a clock all the
// time, and from now and then lets the host see that its vCPU is alive.
//
// The TSC of a TCG guest is QEMU's virtual clock: it stands still while the
// machine is stopped, so the guest cannot see a pause in it. What it does see
// are the stalls while the machine runs (write-protect faults, page-ins, the
// scheduler). Both together are seen from outside: with GD_BEAT_US=n a running
// number is written to port 0xe9 every n microseconds of the guest's own time; an
// isa-debugcon on a UDP chardev makes each a datagram which the host's kernel
// stamps in the vCPU thread's own context, so the reader's scheduling adds
// nothing. Under KVM the TSC runs through a pause and the GAP lines show it.
//
// What is measured is the vCPU, not a thread on it: a writer that shares the vCPU
// beats as well (beat), or its time slices would look like silences of the vCPU.
#include "guestd.h"
#include <sys/io.h>
#include <unistd.h>

static _Atomic u64 longest_ticks, beats, laps;
static double ticks_per_us;
static long spin_cpu = -1;
static u64 beat_ticks; // 0: no beats
static _Atomic u64 next_beat;
static _Atomic unsigned char number;

void beat(long cpu) {
	if (!beat_ticks || cpu != spin_cpu)
		return;
	u64 now = rdtsc(), due = atomic_load_explicit(&next_beat, memory_order_relaxed);
	// Whoever moves the date on sends. Two numbers may change places if the guest
	// switches threads right here.
	if (now < due || !atomic_compare_exchange_strong(&next_beat, &due, now + beat_ticks))
		return;
	outb(atomic_fetch_add(&number, 1), 0xe9);
	atomic_fetch_add_explicit(&beats, 1, memory_order_relaxed);
}

static void *spin(void *arg) {
	(void)arg;
	pin(spin_cpu);
	u64 last = rdtsc(), n = 0;
	for (;;) {
		u64 now = rdtsc(), gap = now - last;
		last = now;
		if (gap > atomic_load_explicit(&longest_ticks, memory_order_relaxed))
			atomic_store_explicit(&longest_ticks, gap, memory_order_relaxed);
		if ((++n & 0xffff) == 0)
			atomic_store_explicit(&laps, n, memory_order_relaxed);
		beat(spin_cpu);
	}
	return NULL;
}

void spin_init(void) {
	if (!param("SPIN", NULL))
		return;
	spin_cpu = (long)param_u64("SPIN", 0);
	u64 t0 = mono_ns(), c0 = rdtsc();
	sleep_until(t0 + 100000000ull);
	ticks_per_us = (double)(rdtsc() - c0) * 1000.0 / (double)(mono_ns() - t0);
	u64 us = param_u64("BEAT_US", 0);
	if (us && iopl(3)) // threads inherit it
		say("FATAL iopl: no access to port 0xe9");
	else
		beat_ticks = us * (u64)ticks_per_us;
}

// A duty cycle: busy for a share of every period by the clock, asleep for the rest.
static void *duty(void *arg) {
	pin((long)(uintptr_t)arg);
	u64 share = param_u64("DUTY", 0), period = param_u64("DUTY_MS", 20) * 1000000ull;
	for (u64 begin = mono_ns();; begin += period) {
		while (mono_ns() < begin + period * share / 100)
			;
		sleep_until(begin + period);
	}
	return NULL;
}

void spin_start(void) {
	if (param("DUTY", NULL))
		for (long cpu = 0; cpu < sysconf(_SC_NPROCESSORS_ONLN); cpu++)
			spawn(duty, (void *)(uintptr_t)cpu, "duty");
	if (spin_cpu >= 0)
		spawn(spin, NULL, "spin");
}

void spin_report(void) {
	if (ticks_per_us == 0)
		return;
	u64 t = atomic_exchange(&longest_ticks, 0);
	say("GAP max_us=%.0f laps=%llu beats=%llu", (double)t / ticks_per_us, (unsigned long long)laps,
	    (unsigned long long)beats);
}
