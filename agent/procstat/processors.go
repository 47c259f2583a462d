package procstat

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
)

// IdleProcessors is how many of the host's processors had nothing to run at this moment:
// those that are online less the tasks that run or wait for one, by /proc/stat. The
// caller's own thread runs, and does not count.
func IdleProcessors() (int, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	return parseIdle(b)
}

func parseIdle(b []byte) (int, error) {
	online := 0
	for l := range bytes.Lines(b) {
		if rest, ok := bytes.CutPrefix(l, []byte("cpu")); ok && len(rest) > 0 && rest[0] >= '0' && rest[0] <= '9' {
			online++ // the line of one; that of all of them has a blank there
			continue
		}
		rest, ok := bytes.CutPrefix(l, []byte("procs_running "))
		if !ok {
			continue
		}
		running, err := strconv.ParseUint(string(bytes.TrimSpace(rest)), 10, 31)
		if err != nil {
			return 0, fmt.Errorf("/proc/stat: %.80q: %w", l, err)
		}
		others := max(int(running)-1, 0)
		return max(online-others, 0), nil
	}
	return 0, errors.New("/proc/stat has no procs_running")
}
