package store

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/image/fsys/memfs"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/procstat"
)

// with is the store as seen by somebody else.
func (s *Store) with(change func(id *identity)) *Store {
	other := &Store{fs: s.fs, dir: s.dir, id: s.id, now: s.now, mu: make(chan struct{}, 1)}
	change(&other.id)
	return other
}

func newStore(t *testing.T) *Store {
	t.Helper()
	s, err := OpenFS(memfs.New(1<<30), "/store")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func commitOne(t *testing.T, s *Store, vm string) string {
	t.Helper()
	txn, err := s.Begin(context.Background(), vm)
	if err != nil {
		t.Fatal(err)
	}
	m := fill(t, txn, "none")
	if err := txn.Commit(context.Background(), m); err != nil {
		t.Fatal(err)
	}
	return txn.ID()
}

func TestLeasesOfOthers(t *testing.T) {
	ctx := context.Background()
	for name, c := range map[string]struct {
		change func(id *identity)
		state  LeaseState
	}{
		"same process":  {func(id *identity) {}, Live},
		"another host":  {func(id *identity) { id.host = "far+00000000" }, Unknown},
		"host rebooted": {func(id *identity) { id.bootID = "later" }, Dead},
		"other pid namespace": {func(id *identity) {
			id.pidSpace = "1"
			id.alive = func(int, uint64) bool { return false }
		}, Unknown},
		"process gone": {func(id *identity) { id.alive = func(int, uint64) bool { return false } }, Dead},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			read := commitOne(t, s, "a")
			commitOne(t, s, "a")
			img, err := s.OpenImage(ctx, read)
			if err != nil {
				t.Fatal(err)
			}
			defer img.Close()
			txn, err := s.Begin(ctx, "a")
			if err != nil {
				t.Fatal(err)
			}
			defer txn.Abort()
			fill(t, txn, "none")

			other := s.with(c.change)
			in, err := other.Inspect(ctx, read)
			if err != nil || len(in.Leases) != 1 || in.Leases[0].State != c.state {
				t.Fatalf("%+v, %v", in.Leases, err)
			}
			if in.Leased() != (c.state != Dead) {
				t.Errorf("leased: %v", in.Leased())
			}
			rep, err := other.GC(ctx, GCOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if gone := len(rep.Removed) > 0; gone != (c.state == Dead) {
				t.Errorf("gc: %+v", rep)
			}
			forced, err := other.GC(ctx, GCOptions{Force: true})
			if err != nil {
				t.Fatal(err)
			}
			if gone := len(forced.Removed)+len(rep.Removed) > 0; gone != (c.state != Live) {
				t.Errorf("gc with force: %+v", forced)
			}
		})
		t.Run(name+"/remove", func(t *testing.T) {
			s := newStore(t)
			read := commitOne(t, s, "a")
			commitOne(t, s, "a")
			img, err := s.OpenImage(ctx, read)
			if err != nil {
				t.Fatal(err)
			}
			defer img.Close()
			other := s.with(c.change)
			_, err = other.Remove(ctx, read, false)
			if (err == nil) != (c.state == Dead) || err != nil && !problem.Is(err, problem.Busy) {
				t.Errorf("remove: %v", err)
			}
			if err == nil {
				return
			}
			_, err = other.Remove(ctx, read, true)
			if (err == nil) != (c.state == Unknown) {
				t.Errorf("remove with force: %v", err)
			}
		})
	}
}

func TestLeaseNames(t *testing.T) {
	id, err := self()
	if err != nil {
		t.Fatal(err)
	}
	name := id.leaseName(Writing, 7)
	l, ok := id.parseLease(name)
	if !ok || l.Role != Writing || l.State != Live || l.PID != id.pid || l.StartTicks != id.startTicks || len(name) > 255 {
		t.Errorf("%q: %+v", name, l)
	}
	for _, odd := range []string{"lease.", "lease.x", "lease.read,a,b,c,d,e,f", "lease.read,h,b,s,-1,2,3", name + ",9"} {
		if l, ok := id.parseLease(odd); !ok || l.State != Unknown {
			t.Errorf("%q: %+v, %v", odd, l, ok)
		}
	}
	if _, ok := id.parseLease("seg-0000"); ok {
		t.Error("a segment is no lease")
	}
}

// TestProcessAlive follows a real process to its end, through being a zombie.
func TestProcessAlive(t *testing.T) {
	cmd := exec.Command("cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	fmt.Fprintln(in, "up")
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	s, err := procstat.Read(pid)
	if err != nil || s.Ended() {
		t.Fatal(s, err)
	}
	ticks := s.StartTicks
	if !processAlive(pid, ticks) {
		t.Error("a running process is not alive")
	}
	if processAlive(pid, ticks+1) {
		t.Error("a pid that was reused is alive")
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	in.Close()
	if _, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 10000); err != nil {
		t.Fatal(err)
	}
	if processAlive(pid, ticks) {
		t.Error("a zombie is alive")
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if processAlive(pid, ticks) {
		t.Error("a process that is gone is alive")
	}
}

func TestIDs(t *testing.T) {
	s := newStore(t)
	first := commitOne(t, s, "a")
	// The clock goes back a year: the next is the newest all the same.
	past := s.with(func(*identity) {})
	now := s.now()
	past.now = func() time.Time { return now.AddDate(-1, 0, 0) }
	second := commitOne(t, past, "a")
	if second <= first {
		t.Errorf("%s after %s", second, first)
	}
	sel, err := s.Get(context.Background(), "a", GetOptions{})
	if err != nil || sel.Info.ID != second {
		t.Errorf("%s, %v", sel.Info.ID, err)
	}
	for _, bad := range []string{"", "x", "20261121T234612123", "20261121T234612123-4f3a9c1", "20261121T234612123-4F3A9C1E", "20269921T234612123-4f3a9c1e", "20261121T234612123-4f3a9c1e.tmp", ".."} {
		if _, ok := parseID(bad); ok {
			t.Errorf("%q is an id", bad)
		}
	}
	if _, ok := parseID(first); !ok {
		t.Errorf("%q is none", first)
	}
	for _, name := range []string{"web", "web 1", "ü/..", "%41", strings.Repeat("a", 200)} {
		if got := vmName(vmDir(name)); got != name {
			t.Errorf("%q became %q", name, got)
		}
	}
}

// TestLockIsBusy holds the lock as another process would.
func TestLockIsBusy(t *testing.T) {
	s := newStore(t)
	commitOne(t, s, "a")
	l, err := s.fs.TryLock(filepath.Join(s.dir, lockName))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { _, err := s.Begin(ctx, "a"); done <- err }()
	cancel()
	if err := <-done; !problem.Is(err, problem.Cancelled) {
		t.Errorf("got %v", err)
	}
	go func() { _, err := s.Begin(context.Background(), "a"); done <- err }()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Errorf("got %v", err)
	}
}

func TestStoreFromTheFuture(t *testing.T) {
	f := memfs.New(1 << 20)
	if err := fsys.MkdirAll(f, "/store"); err != nil {
		t.Fatal(err)
	}
	if err := fsys.WriteFile(f, "/store/store.json", []byte(`{"format":"ckagent-store","version":2}`)); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenFS(f, "/store"); !problem.Is(err, problem.Refused) {
		t.Errorf("got %v", err)
	}
	if err := f.Update("/store/store.json", func([]byte) []byte { return []byte("{") }); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenFS(f, "/store"); !problem.Is(err, problem.Integrity) {
		t.Errorf("got %v", err)
	}
}

// TestLend: a lease in the name of another process keeps the checkpoint for as long
// as that process lives, or until it is taken back.
func TestLend(t *testing.T) {
	ctx := context.Background()
	lent := func(t *testing.T, s *Store) (id string, c *exec.Cmd, takeBack func() error) {
		t.Helper()
		id = commitOne(t, s, "a")
		commitOne(t, s, "a") // so that the other is not the last good one
		c = exec.Command("sleep", "600")
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
		stat, err := procstat.Read(c.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		img, err := s.OpenImage(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		if takeBack, err = img.Lend(ctx, c.Process.Pid, stat.StartTicks); err != nil {
			t.Fatal(err)
		}
		if _, err := img.Lend(ctx, 0, 0); err == nil {
			t.Error("lent to nobody")
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		_, err = s.Remove(ctx, id, true)
		if !problem.Is(err, problem.Busy) || !strings.Contains(err.Error(), fmt.Sprint(c.Process.Pid)) {
			t.Errorf("removed while another process needs it: %v", err)
		}
		if rep, err := s.ApplyRetention(ctx, "a", 1); err != nil || len(rep.Removed) != 0 {
			t.Errorf("retention: %+v %v", rep, err)
		}
		if rep, err := s.GC(ctx, GCOptions{}); err != nil || len(rep.Removed) != 0 {
			t.Errorf("gc: %+v %v", rep, err)
		}
		return id, c, takeBack
	}
	t.Run("taken back", func(t *testing.T) {
		s := newStore(t)
		id, _, takeBack := lent(t, s)
		if err := takeBack(); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Remove(ctx, id, false); err != nil {
			t.Error(err)
		}
		if err := takeBack(); err != nil {
			t.Errorf("twice: %v", err)
		}
	})
	t.Run("process ends", func(t *testing.T) {
		s := newStore(t)
		id, c, _ := lent(t, s)
		_ = c.Process.Kill()
		_ = c.Wait() // it says that it was killed
		if rep, err := s.GC(ctx, GCOptions{}); err != nil || len(rep.Removed) != 1 {
			t.Errorf("gc of the dead one's lease: %+v %v", rep, err)
		}
		if _, err := s.Remove(ctx, id, false); err != nil {
			t.Error(err)
		}
	})
}

// TestDiskNeedsCheckpoint: a checkpoint stays while there is an image that is built
// on its volumes, whether or not somebody has it open.
func TestDiskNeedsCheckpoint(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	s, err := OpenFS(fsys.OS{}, filepath.Join(dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	id := commitOne(t, s, "a")
	commitOne(t, s, "a")
	img, err := s.OpenImage(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(dir, "disk,with a comma.qcow2")
	if _, err := img.HoldFor(ctx, "relative"); err == nil {
		t.Error("a relative path was taken")
	}
	release, err := img.HoldFor(ctx, disk)
	if err != nil {
		t.Fatal(err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	qemuImg := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
			t.Fatalf("qemu-img %q: %v: %s", args, err, out)
		}
	}
	below := filepath.Join(dir, "below")
	qemuImg("create", "-q", "-f", "qcow2", below, "1M")
	held := func(what string, want bool) {
		t.Helper()
		rep, err := s.GC(ctx, GCOptions{DryRun: true})
		if err != nil || (len(rep.Removed) == 0) != want {
			t.Errorf("%s: gc would remove %+v, %v", what, rep.Removed, err)
		}
		if !want {
			return
		}
		if _, err := s.Remove(ctx, id, true); !problem.Is(err, problem.Busy) || !strings.Contains(err.Error(), disk) {
			t.Errorf("%s: removed: %v", what, err)
		}
		if rep, err := s.ApplyRetention(ctx, "a", 1); err != nil || len(rep.Removed) != 0 {
			t.Errorf("%s: retention: %+v %v", what, rep, err)
		}
	}
	// Between the lease and the image, and between the lease's name and its content.
	held("about to be made", true)
	unwritten := filepath.Join(filepath.Dir(img.lease), s.id.leaseName(Disk, 7))
	if err := release(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(unwritten, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if rep, err := s.GC(ctx, GCOptions{}); err != nil || len(rep.Removed) != 0 {
		t.Errorf("gc of a lease that is being written: %+v, %v", rep.Removed, err)
	}
	if err := os.WriteFile(unwritten, []byte(disk), 0o600); err != nil {
		t.Fatal(err)
	}
	release = func() error { return removeFile(s.fs, unwritten) }
	// From here on who took it has ended.
	s.id.alive = func(int, uint64) bool { return false }
	held("no such image, and nobody to make it", false)
	qemuImg("create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", disk)
	held("built on another", true)
	far := s.with(func(id *identity) { id.host = "far+00000000" })
	if _, err := far.Remove(ctx, id, false); !problem.Is(err, problem.Busy) {
		t.Errorf("seen from another host: %v", err)
	}
	// Another boot: images outlive it.
	s.id.bootID = "later"
	held("after a reboot", true)
	qemuImg("rebase", "-f", "qcow2", "-b", "", disk)
	held("flattened", false)
	if _, err := s.Remove(ctx, id, false); err != nil {
		t.Error(err)
	}
	if err := release(); err != nil {
		t.Errorf("of what is gone: %v", err)
	}
}
