package procstat

import "testing"

func TestAvailableMemory(t *testing.T) {
	for in, want := range map[string]uint64{
		"MemTotal:  100 kB\nMemAvailable:    1024 kB\nX: 1\n": 1 << 20,
		"MemAvailable: 0 kB\n":                                0,
	} {
		if got, err := parseAvailable([]byte(in)); err != nil || got != want {
			t.Errorf("%q: %d, %v, want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "MemTotal: 1 kB\n", "MemAvailable:\n", "MemAvailable: x kB\n", "MemAvailable: 1 MB\n", "MemAvailable: 18446744073709551615 kB\n"} {
		if got, err := parseAvailable([]byte(in)); err == nil {
			t.Errorf("%q: %d and no error", in, got)
		}
	}
	if n, err := AvailableMemory(); err != nil || n == 0 {
		t.Errorf("of this host: %d, %v", n, err)
	}
}
