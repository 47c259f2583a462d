package capture

import "testing"

// TestThreads: there are as many as processors are idle, and few on a busy host.
func TestThreads(t *testing.T) {
	for _, c := range []struct{ allowed, idle, plain, compressing, direct int }{
		{1, 0, 1, 1, 2},
		{1, 1, 1, 1, 2},
		{2, 2, 1, 1, 2}, // one is the guest's
		{4, 4, 2, 3, 4},
		{4, 1, 1, 1, 2},
		{8, 8, 4, 6, 8},
		{8, 5, 2, 5, 5},
		{8, 0, 1, 1, 2},   // the guests need them all
		{4, 50, 3, 3, 4},  // we may use four of a large host's
		{64, 60, 6, 6, 8}, // no more than the image has lanes
	} {
		if got := scanThreads(c.allowed, c.idle, false); got != c.plain {
			t.Errorf("%d of %d idle: %d threads scan, want %d", c.idle, c.allowed, got, c.plain)
		}
		if got := scanThreads(c.allowed, c.idle, true); got != c.compressing {
			t.Errorf("%d of %d idle: %d threads scan and compress, want %d", c.idle, c.allowed, got, c.compressing)
		}
		if got := directThreads(c.allowed, c.idle); got != c.direct {
			t.Errorf("%d of %d idle: %d threads for a stopped VM, want %d", c.idle, c.allowed, got, c.direct)
		}
	}
	if allowed, idle := spareProcessors(); allowed < 1 || idle < 0 {
		t.Errorf("of this host: %d, of them idle %d", allowed, idle)
	}
}
