package torture

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// Bound is how long the guest may be silent after a harm: 1 s and 30 ms for each
// GiB armed.
func Bound(memoryMiB int) time.Duration {
	return time.Second + time.Duration(memoryMiB)*30*time.Millisecond/1024
}

// openFiles lists what a process has open, sockets without their numbers.
func openFiles(pid int) (map[string]int, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	out := map[string]int{}
	for _, e := range entries {
		link, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil {
			continue // closed meanwhile
		}
		if kind, _, ok := strings.Cut(link, ":["); ok && !strings.HasPrefix(link, "anon_inode") {
			link = kind
		}
		out[link]++
	}
	return out, nil
}

// more is what now has more of than before.
func more(before, now map[string]int) string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(now)) {
		if d := now[k] - before[k]; d > 0 {
			out = append(out, fmt.Sprintf("%d x %s", d, k))
		}
	}
	return strings.Join(out, ", ")
}

// traces looks for what must not be in QEMU: registrations, descriptors, tracers,
// stopped threads. "" if there is nothing.
func traces(pid int) string {
	var found []string
	files, err := openFiles(pid)
	if err != nil {
		return err.Error()
	}
	if n := files["anon_inode:[userfaultfd]"]; n > 0 {
		found = append(found, fmt.Sprintf("%d userfaultfds", n))
	}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(tasks) == 0 {
		return "it has no threads"
	}
	for _, path := range tasks {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // the thread ended
		}
		for line := range strings.Lines(string(b)) {
			switch key, value, _ := strings.Cut(line, ":"); {
			case key == "TracerPid" && strings.TrimSpace(value) != "0":
				found = append(found, "traced by "+strings.TrimSpace(value))
			case key == "State" && strings.ContainsAny(strings.TrimSpace(value)[:1], "Tt"):
				found = append(found, "a stopped thread")
			}
		}
	}
	if list, err := vmtest.Mappings(pid); err != nil {
		return err.Error()
	} else if kinds := registered(list); kinds != "" {
		found = append(found, kinds)
	}
	return strings.Join(found, ", ")
}

// registered names the kinds of registered mappings.
func registered(list []vmtest.Mapping) string {
	n := map[string]int{}
	for _, m := range list {
		for _, f := range m.Flags {
			if f == "uw" || f == "um" || f == "ui" {
				n[f]++
			}
		}
	}
	var out []string
	for _, k := range slices.Sorted(maps.Keys(n)) {
		out = append(out, fmt.Sprintf("%d %s mappings", n[k], k))
	}
	return strings.Join(out, ", ")
}

// markedPages counts the pages of a range whose page table entry says that they
// are write-protected by a userfaultfd (bit 57).
func markedPages(pid int, start, bytes uint64) (n uint64, err error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for at, end := int64(start/4096*8), int64((start+bytes)/4096*8); at < end; {
		k, err := f.ReadAt(buf[:min(int64(len(buf)), end-at)], at)
		if k == 0 && err != nil && !errors.Is(err, io.EOF) {
			return n, err
		}
		if k == 0 {
			return n, nil
		}
		for i := 0; i+8 <= k; i += 8 {
			n += binary.LittleEndian.Uint64(buf[i:]) >> 57 & 1
		}
		at += int64(k)
	}
	return n, nil
}

// silence is the longest time without a heartbeat after an instant, and the
// longest at all between from and to.
func silence(b *vmtest.Beats, from, act, to time.Time) (after, whole time.Duration) {
	list := b.Between(from.Add(-time.Second), to)
	last := from.Add(-time.Second)
	for _, x := range list {
		if whole = max(whole, x.At.Sub(last)); x.At.After(act) {
			begin := last
			if begin.Before(act) {
				begin = act
			}
			after = max(after, x.At.Sub(begin))
		}
		last = x.At
	}
	if to.After(last) {
		whole = max(whole, to.Sub(last))
		if last.Before(act) {
			last = act
		}
		after = max(after, to.Sub(last))
	}
	return after, whole
}

// beating reports whether the guest gave a sign of life just now.
func (b *Bed) beating() bool {
	now := time.Now()
	return len(b.vm.Beats().Between(now.Add(-50*time.Millisecond), now)) > 0
}

// settled is nil when the VM is as it was, and nothing of ours is in it.
func (b *Bed) settled(ctx context.Context, paused bool) error {
	if !paused && !b.beating() {
		return errors.New("the guest gives no sign of life")
	}
	if found := traces(b.PID()); found != "" {
		return errors.New("in QEMU: " + found)
	}
	want := "running"
	if paused {
		want = "paused"
	}
	if got, err := b.status(ctx); err != nil || got != want {
		return fmt.Errorf("the VM is %q (%v), was %s", got, err, want)
	}
	return nil
}

// leftovers is what must be gone at the end of a round.
func (b *Bed) leftovers() error {
	var errs []error
	if hva, n, err := b.vm.MainRAM(); err != nil {
		errs = append(errs, err)
	} else if marked, err := markedPages(b.PID(), hva, n); err != nil || marked > 0 {
		errs = append(errs, fmt.Errorf("%d pages are marked as write-protected (%v)", marked, err))
	}
	names, _ := filepath.Glob(filepath.Join(b.state, strconv.Itoa(b.PID())+"-*"))
	for _, n := range names {
		if !strings.HasSuffix(n, ".report.json") {
			errs = append(errs, errors.New("left in the state directory: "+filepath.Base(n)))
		}
	}
	// A cgroup whose last process died a moment too late is removed by the next
	// guardian: only one with somebody in it is a leftover.
	groups, _ := filepath.Glob("/sys/fs/cgroup/*/ckagent/guardian-" + strconv.Itoa(b.PID()) + "-*/cgroup.procs")
	for _, path := range groups {
		if procs, err := os.ReadFile(path); err == nil && len(procs) > 0 {
			errs = append(errs, fmt.Errorf("left in cgroup %s: %q", filepath.Dir(path), procs))
		}
	}
	return errors.Join(errs...)
}

// moreOpen is what QEMU has open that it had not before anything of ours. It
// notices a closed connection by itself.
func (b *Bed) moreOpen() error {
	var extra string
	if await(2*time.Second, func() bool {
		files, err := openFiles(b.PID())
		if err != nil {
			extra = err.Error()
			return false
		}
		extra = more(b.fds, files)
		return extra == ""
	}) {
		return nil
	}
	return errors.New("QEMU has more open: " + extra)
}

// checkStore: what is visible is whole, the former checkpoint among it, and
// exactly as many as there should be. maybe says that one more may be there.
func (b *Bed) checkStore(ctx context.Context, must, maybe bool) error {
	list, err := b.list(ctx)
	if err != nil {
		return err
	}
	st, err := store.Open(b.store)
	if err != nil {
		return err
	}
	var errs []error
	found := b.base == ""
	for _, i := range list {
		if i.Damage != nil {
			errs = append(errs, fmt.Errorf("checkpoint %s is visible and damaged: %w", i.ID, i.Damage))
		}
		if i.ID == b.base {
			found = true
		}
		if _, err := st.Verify(ctx, i.ID, nil); err != nil {
			errs = append(errs, fmt.Errorf("checkpoint %s: %w", i.ID, err))
		}
	}
	if !found {
		errs = append(errs, errors.New("the former checkpoint is gone"))
	}
	switch extra := len(list) - b.seen; {
	case extra == 1 && (must || maybe):
	case extra == 0 && !must:
	default:
		errs = append(errs, fmt.Errorf("%d checkpoints are visible, %d were (a new one reported: %v)", len(list), b.seen, must))
	}
	if b.base != "" {
		errs = append(errs, b.prune(ctx, list))
	} else {
		b.seen = len(list)
	}
	return errors.Join(errs...)
}

// await polls a condition that nothing announces.
func await(d time.Duration, done func() bool) bool {
	if done() {
		return true
	}
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(d); time.Now().Before(deadline); {
		<-tick.C
		if done() {
			return true
		}
	}
	return false
}
