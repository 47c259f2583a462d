package procstat

import (
	"runtime"
	"testing"
)

func TestIdleProcessors(t *testing.T) {
	const two = "cpu  5 2 1 4\ncpu0 2 1 7 2\ncpu1 2 1 7 2\nintr 7 0 0\nctxt 9\n"
	for in, want := range map[string]int{
		two + "procs_running 1\nprocs_blocked 3\n":           2,
		two + "procs_running 0\n":                            2, // we are elsewhere by now
		two + "procs_running 2\n":                            1,
		two + "procs_running 3\n":                            0,
		two + "procs_running 90\n":                           0,
		"cpu 1\ncpu0 1\ncpu7 1\ncpu128 1\nprocs_running 2\n": 2, // two of them are offline
		"procs_running 1\n":                                  0,
	} {
		if got, err := parseIdle([]byte(in)); err != nil || got != want {
			t.Errorf("%q: %d, %v, want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "cpu", two, two + "procs_running \n", two + "procs_running -1\n", two + "procs_running 4294967296\n", two + "procs_running x\n"} {
		if got, err := parseIdle([]byte(in)); err == nil {
			t.Errorf("%q: %d and no error", in, got)
		}
	}
	// Ours may be fewer than the host's, and never more.
	b, err := IdleProcessors()
	if err != nil || b < 0 {
		t.Errorf("of this host, of whose processors %d are ours: %d, %v", runtime.NumCPU(), b, err)
	}
}
