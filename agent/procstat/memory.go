package procstat

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
)

// AvailableMemory is what the host could give without swapping, in bytes: MemAvailable
// of /proc/meminfo.
func AvailableMemory() (uint64, error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	return parseAvailable(b)
}

func parseAvailable(b []byte) (uint64, error) {
	for l := range bytes.Lines(b) {
		rest, ok := bytes.CutPrefix(l, []byte("MemAvailable:"))
		if !ok {
			continue
		}
		f := bytes.Fields(rest)
		if len(f) != 2 || string(f[1]) != "kB" {
			return 0, fmt.Errorf("/proc/meminfo: %.80q", l)
		}
		kib, err := strconv.ParseUint(string(f[0]), 10, 54) // as bytes it fits too
		if err != nil {
			return 0, fmt.Errorf("/proc/meminfo: %.80q: %w", l, err)
		}
		return kib << 10, nil
	}
	return 0, errors.New("/proc/meminfo has no MemAvailable")
}
