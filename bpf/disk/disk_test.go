package disk

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func monitor(t *testing.T) *Monitor {
	t.Helper()
	m, err := Load()
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

// TestWrites of this process, by every system call that writes.
func TestWrites(t *testing.T) {
	m := monitor(t)
	if err := m.Attach(os.Getpid()); err != nil {
		t.Fatal(err)
	}
	if err := m.Attach(os.Getpid()); err == nil {
		t.Error("attached twice")
	}
	path := filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd := int(f.Fd())
	buf := make([]byte, 5000)
	if _, err := unix.Write(fd, buf); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Pwrite(fd, buf[:100], 9000); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Writev(fd, [][]byte{buf[:10], buf[:20]}); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Pwritev(fd, [][]byte{buf[:300], buf[:4000]}, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Pwritev2(fd, [][]byte{buf[:7]}, 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(unix.Fsync(fd), unix.Fdatasync(fd)); err != nil {
		t.Fatal(err)
	}
	_, _ = unix.Pread(fd, buf, 0) // a read is no write
	pipe := make([]int, 2)
	if err := unix.Pipe(pipe); err != nil {
		t.Fatal(err)
	}
	_, _ = unix.Write(pipe[1], buf[:50]) // nor is a pipe a file
	unix.Close(pipe[0])
	unix.Close(pipe[1])
	id, ok, err := FileOf(path)
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	all, missed, err := m.Read(os.Getpid())
	if err != nil || missed != 0 {
		t.Fatal(missed, err)
	}
	if got, want := all[id], (Written{Bytes: 5000 + 100 + 30 + 4300 + 7, Writes: 5, Syncs: 2}); got != want {
		t.Errorf("%+v, want %+v; all: %+v", got, want, all)
	}
	if err := m.Detach(os.Getpid()); err != nil {
		t.Error(err)
	}
	var k objectsFileKey
	if err := m.objs.Files.NextKey(nil, &k); !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Errorf("a file is left: %+v %v", k, err)
	}
	if _, ok, err := FileOf("/dev/null"); ok || err != nil {
		t.Errorf("/dev/null is a disk: %v %v", ok, err)
	}
}

// TestQEMU: the block layer of QEMU itself, in all its ways, writes a known number of
// bytes.
func TestQEMU(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Fatal("qemu-img is not installed: ", err)
	}
	m := monitor(t)
	if m.Missing() != nil {
		t.Fatalf("%+v", m.Missing())
	}
	path := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.Truncate(path, 0); !os.IsNotExist(err) {
		t.Fatal(err)
	}
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "raw", path, "16M").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	id, _, err := FileOf(path)
	if err != nil {
		t.Fatal(err)
	}
	const count, size = 200, 65536
	for _, args := range [][]string{
		{"-t", "writeback"}, {"-t", "none"}, {"-t", "none", "-n"}, {"-t", "none", "-i", "io_uring"}, {"-t", "writeback", "-i", "io_uring"},
	} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			w, missed := bench(t, m, id, append(append([]string{"bench", "-q", "-w", "-c", "200", "-s", "65536", "-S", "65536", "-f", "raw"}, args...), path))
			t.Logf("%+v", w)
			if w.Bytes != count*size || missed != 0 {
				t.Errorf("%d bytes, want %d; missed %d", w.Bytes, count*size, missed)
			}
			if native := args[len(args)-1] == "-n"; (w.SubmittedBytes > 0) != native {
				t.Errorf("%d bytes as submitted", w.SubmittedBytes)
			}
			if w.Syncs != 1 { // at the end
				t.Errorf("%d syncs", w.Syncs)
			}
		})
	}
}

// bench runs qemu-img, counted from its first instruction on.
func bench(t *testing.T, m *Monitor, id File, args []string) (Written, uint64) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	c := exec.Command("qemu-img", args...)
	c.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	c.Stderr = os.Stderr
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	pid := c.Process.Pid
	var ws unix.WaitStatus
	_, err := unix.Wait4(pid, &ws, 0, nil)
	if err == nil {
		err = m.Attach(pid)
	}
	if err = errors.Join(err, unix.PtraceDetach(pid), c.Wait()); err != nil {
		t.Fatal(err)
	}
	all, missed, err := m.Read(pid)
	if err = errors.Join(err, m.Detach(pid)); err != nil {
		t.Fatal(err)
	}
	return all[id], missed
}
