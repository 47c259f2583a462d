package e2e

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// traces lists what ckagent has left in or around a QEMU process, read from the
// kernel: descriptors, registered or protected memory, a tracer, cgroups.
func traces(pid int) (found []string, err error) {
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil || len(fds) == 0 {
		return nil, fmt.Errorf("descriptors of %d: %d, %v", pid, len(fds), err)
	}
	for _, fd := range fds {
		link, err := os.Readlink(fd)
		if err == nil && (strings.Contains(link, "userfaultfd") || strings.Contains(link, "memfd:ckagent")) {
			found = append(found, fd+" is "+link)
		}
	}
	maps, err := vmtest.Mappings(pid)
	if err != nil {
		return nil, err
	}
	for _, m := range maps {
		for _, f := range []string{"um", "uw", "ui"} {
			if slices.Contains(m.Flags, f) {
				found = append(found, fmt.Sprintf("memory %x-%x is registered (%s)", m.Start, m.End, f))
			}
		}
		if slices.Contains(m.Flags, "dc") { // guest memory
			armed, err := armedPages(pid, m)
			if err != nil {
				return nil, err
			}
			if armed > 0 {
				found = append(found, fmt.Sprintf("%d pages of %x-%x are protected", armed, m.Start, m.End))
			}
		}
	}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil {
		return nil, err
	}
	for _, task := range tasks {
		status, err := os.ReadFile(task)
		if err != nil {
			continue // a thread that has ended
		}
		for line := range strings.Lines(string(status)) {
			if tracer, ok := strings.CutPrefix(line, "TracerPid:"); ok && strings.TrimSpace(tracer) != "0" {
				found = append(found, task+": "+strings.TrimSpace(line))
			}
			if state, ok := strings.CutPrefix(line, "State:"); ok && strings.ContainsAny(strings.Fields(state)[0], "Tt") {
				found = append(found, task+": "+strings.TrimSpace(line))
			}
		}
	}
	for _, pattern := range []string{"/sys/fs/cgroup/ckagent/guardian-%d-*", "/sys/fs/cgroup/*/ckagent/guardian-%d-*"} {
		left, err := filepath.Glob(fmt.Sprintf(pattern, pid))
		if err != nil {
			return nil, err
		}
		found = append(found, left...)
	}
	return found, nil
}

// armedPages counts the pages with the mark of write protection in the page map.
func armedPages(pid int, m vmtest.Mapping) (n int, err error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	const wp = 1 << 57
	buf := make([]byte, 1<<20)
	for at, end := int64(m.Start/4096*8), int64(m.End/4096*8); at < end; at += int64(len(buf)) {
		b := buf[:min(int64(len(buf)), end-at)]
		if _, err := f.ReadAt(b, at); err != nil {
			return 0, err
		}
		for i := 0; i < len(b); i += 8 {
			if binary.LittleEndian.Uint64(b[i:])&wp != 0 {
				n++
			}
		}
	}
	return n, nil
}

// wantUntouched fails if anything of ours is in or around the process.
func wantUntouched(t testing.TB, pid int) {
	t.Helper()
	found, err := traces(pid)
	if err != nil {
		t.Errorf("traces in %d: %v", pid, err)
	}
	if len(found) > 0 {
		t.Errorf("left in pid %d: %s", pid, strings.Join(found, "; "))
	}
}

// processes are those that run this tool's binary.
func (x *tool) processes() (pids []int) {
	links, _ := filepath.Glob("/proc/[0-9]*/exe")
	for _, l := range links {
		if exe, err := os.Readlink(l); err == nil && strings.TrimSuffix(exe, " (deleted)") == x.bin {
			if pid, err := strconv.Atoi(strings.Split(l, "/")[2]); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// wantNoProcess fails if a process of this tool does not end soon, and ends it.
func (x *tool) wantNoProcess(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	for _, pid := range x.processes() {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue
		}
		if !awaitExit(ctx, fd) {
			args, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			t.Errorf("still there: %d %q", pid, strings.ReplaceAll(string(args), "\x00", " "))
			_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) // it is gone already, or goes now
			awaitExit(context.WithoutCancel(ctx), fd)
		}
		unix.Close(fd)
	}
}

// awaitExit waits for the process of a pidfd, a bounded time.
func awaitExit(ctx context.Context, fd int) bool {
	limit := 10 * time.Second
	if d, ok := ctx.Deadline(); ok {
		limit = max(0, time.Until(d))
	}
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, _ := unix.Poll(p, int(limit.Milliseconds()))
	return n > 0
}

func openPID(pid int) (int, error) { return unix.PidfdOpen(pid, 0) }

func closeFD(fd int) { unix.Close(fd) }
