package faultserver

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/uffd/pagemap"
)

// hazards are what a host does to memory behind everybody's back.
func TestHazards(t *testing.T) {
	writeSome := func(g *target) {
		for p := 0; p < len(g.mem)/pageBytes; p += 3 {
			g.write(p, 5)
		}
	}
	whole := func(t *testing.T, g *target, advice int) {
		t.Helper()
		if err := unix.Madvise(g.mem, advice); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name      string
		kind      source.Kind
		huge      bool
		prepare   func(t *testing.T)
		before    func(t *testing.T, g *target)
		meanwhile func(t *testing.T, g *target)
		may       bool // be discarded
		must      bool
	}{
		{name: "compaction", meanwhile: func(t *testing.T, g *target) {
			for range 3 {
				if err := os.WriteFile("/proc/sys/vm/compact_memory", []byte("1"), 0); err != nil {
					t.Fatal(err)
				}
				writeSome(g)
			}
		}},
		{name: "compaction of shared memory", kind: source.Shared, meanwhile: func(t *testing.T, g *target) {
			if err := os.WriteFile("/proc/sys/vm/compact_memory", []byte("1"), 0); err != nil {
				t.Fatal(err)
			}
			writeSome(g)
		}},
		{name: "huge pages are split", huge: true, meanwhile: func(_ *testing.T, g *target) { writeSome(g) }},
		{name: "huge pages are given back", huge: true, must: true, meanwhile: func(t *testing.T, g *target) {
			if err := unix.Madvise(g.mem[:hugePages*pageBytes], unix.MADV_DONTNEED); err != nil {
				t.Fatal(err)
			}
			writeSome(g)
		}},
		{name: "pages are given back and taken again", must: true, meanwhile: func(t *testing.T, g *target) {
			whole(t, g, unix.MADV_DONTNEED)
			writeSome(g)
		}},
		// Its pages stay in the file, and so do the marks: nothing is lost.
		{name: "mappings of shared memory are dropped", kind: source.Shared, meanwhile: func(t *testing.T, g *target) {
			whole(t, g, unix.MADV_DONTNEED)
			writeSome(g)
		}},
		{name: "threads are first at the same pages", meanwhile: firstTogether},
		{name: "threads are first at the same pages of shared memory", kind: source.Shared, meanwhile: firstTogether},
		{name: "direct I/O fills untouched pages", meanwhile: func(t *testing.T, g *target) {
			for p := 5; p < len(g.mem)/pageBytes; p += 64 {
				readDirectly(t, g.mem[p*pageBytes:][:3*pageBytes])
			}
		}},
		{name: "the process forks", meanwhile: func(t *testing.T, g *target) {
			forked(t, func() { writeSome(g) })
		}},
		{name: "protection is changed and back", meanwhile: func(t *testing.T, g *target) {
			for _, prot := range []int{unix.PROT_READ, unix.PROT_READ | unix.PROT_WRITE} {
				if err := unix.Mprotect(g.mem, prot); err != nil {
					t.Fatal(err)
				}
			}
			writeSome(g)
		}},
		{name: "pages are swapped out and read", prepare: swapOn, meanwhile: func(t *testing.T, g *target) {
			whole(t, g, unix.MADV_PAGEOUT)
			for p := range len(g.mem) / pageBytes {
				if p%8 == 1 {
					_ = bytes.IndexByte(g.mem[p*pageBytes:][:pageBytes], 0xff)
				}
			}
		}},
		{name: "pages are swapped out and written", must: true, prepare: swapOn, meanwhile: func(t *testing.T, g *target) {
			whole(t, g, unix.MADV_PAGEOUT)
			writeSome(g)
		}},
		{name: "same pages were merged", before: func(t *testing.T, g *target) {
			alike(t, g)
			merge(t, g)
		}, meanwhile: func(_ *testing.T, g *target) { writeSome(g) }},
		// Merging takes the marks off without a fault, of pages written and not.
		{name: "same pages are merged", must: true, before: alike, meanwhile: func(t *testing.T, g *target) {
			merge(t, g)
			writeSome(g)
		}},
		{name: "pages are marked free", may: true, meanwhile: func(t *testing.T, g *target) {
			whole(t, g, unix.MADV_FREE)
			writeSome(g)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.prepare != nil {
				c.prepare(t)
			}
			_, err := trial{kind: c.kind, huge: c.huge, pages: 2048, before: c.before, meanwhile: c.meanwhile}.run(t)
			switch {
			case err == nil && c.must:
				t.Error("it was not noticed")
			case err != nil && (!c.may && !c.must || FailureOf(err) != Unproven):
				t.Error(err)
			}
			t.Log(err)
		})
	}
}

// firstTogether has two threads write all pages that nobody has touched, in the same order.
func firstTogether(_ *testing.T, g *target) {
	var wg sync.WaitGroup
	for id := range 2 {
		wg.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			for p := range len(g.mem) / pageBytes {
				if p%8 >= 5 {
					g.mem[p*pageBytes+id] = 1
				}
			}
		})
	}
	wg.Wait()
}

// readDirectly fills memory from a file in a way that pins it.
func readDirectly(t *testing.T, dst []byte) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(path, bytes.Repeat([]byte{7}, len(dst)), 0o600); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if n, err := unix.Pread(fd, dst, 0); err != nil || n != len(dst) {
		t.Fatal(n, err)
	}
}

// alike makes pages with content the same, and lets the kernel merge them.
func alike(t *testing.T, g *target) {
	t.Helper()
	for p := range len(g.mem) / pageBytes {
		if p%8 < 5 {
			g.write(p, 1)
		}
	}
	if err := unix.Madvise(g.mem, unix.MADV_MERGEABLE); err != nil {
		t.Fatal(err)
	}
}

// merge has the kernel merge same pages until half of those with content are.
func merge(t *testing.T, g *target) {
	t.Helper()
	for name, value := range map[string]string{"pages_to_scan": "4096", "sleep_millisecs": "2", "run": "1"} {
		path := filepath.Join("/sys/kernel/mm/ksm", name)
		before, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(path, []byte(value), 0)
		}
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := os.WriteFile(path, bytes.TrimSpace(before), 0); err != nil {
				t.Error(err)
			}
		}()
	}
	pm, err := pagemap.OpenSelf()
	if err != nil {
		t.Fatal(err)
	}
	defer pm.Close()
	entries := make([]pagemap.Entry, len(g.mem)/pageBytes)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(20 * time.Second); ; <-tick.C {
		if _, err := pm.Entries(uint64(uintptr(unsafe.Pointer(&g.mem[0]))), entries); err != nil {
			t.Fatal(err)
		}
		pages, frames := 0, map[uint64]bool{}
		for _, e := range entries {
			if e.Present() {
				pages++
				frames[e.PFN()] = true
			}
		}
		if len(frames) <= pages/2 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d frames for %d equal pages", len(frames), pages)
		}
	}
}

// forked forks a child that shares all pages, does something in the parent, and ends the
// child.
func forked(t *testing.T, do func()) {
	t.Helper()
	pid, err := bareFork()
	if err != nil {
		t.Fatal(err)
	}
	do()
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Error(err)
	}
	if _, err := unix.Wait4(pid, nil, 0, nil); err != nil {
		t.Error(err)
	}
}

// bareFork makes a child that shares all pages and sleeps until it is killed.
func bareFork() (pid int, err error) {
	r, _, errno := syscall.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	for r == 0 { // the child: nothing of the runtime works here
		_, _, _ = syscall.RawSyscall(unix.SYS_PAUSE, 0, 0, 0)
	}
	return int(r), nil
}

// swapOn gives the machine swap for the duration of a test.
func swapOn(t *testing.T) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "swap")
	if err := os.WriteFile(path, make([]byte, 32<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"/sbin/mkswap", path}, {"/sbin/swapon", path}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	t.Cleanup(func() {
		if out, err := exec.Command("/sbin/swapoff", path).CombinedOutput(); err != nil {
			t.Errorf("swapoff: %v: %s", err, out)
		}
	})
}
