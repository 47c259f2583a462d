package pagemap

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/ckagent/ckagent/uffd"
	"golang.org/x/sys/unix"
)

// forker is a running testdata/forker.c.
type forker struct {
	cmd          *exec.Cmd
	in           io.WriteCloser
	out          *bufio.Scanner
	priv, shared uint64
	h            *uffd.Handle
	pm           *Pagemap
}

func startForker(t *testing.T) *forker {
	t.Helper()
	gcc, err := exec.LookPath("gcc")
	if err != nil {
		t.Skip("no gcc on this machine: the forking target cannot be built")
	}
	bin := filepath.Join(t.TempDir(), "forker")
	if out, err := exec.Command(gcc, "-O1", "-Wall", "-o", bin, "testdata/forker.c").CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	theirs := os.NewFile(uintptr(pair[1]), "socket")
	defer theirs.Close()

	f := &forker{cmd: exec.Command(bin)}
	f.cmd.ExtraFiles = []*os.File{theirs}
	f.cmd.Stderr = os.Stderr
	f.cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if f.in, err = f.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stdout, err := f.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	f.out = bufio.NewScanner(stdout)
	if err := f.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.in.Close()
		_ = f.cmd.Process.Kill()
		_ = f.cmd.Wait()
	})

	if !f.out.Scan() {
		t.Fatal("the target said nothing")
	}
	if _, err := fmt.Sscanf(f.out.Text(), "0x%x 0x%x", &f.priv, &f.shared); err != nil {
		t.Fatal(err)
	}
	var b [1]byte
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(pair[0], b[:], oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		t.Fatal(msgs, err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		t.Fatal(fds, err)
	}
	f.h, err = uffd.Adopt(os.NewFile(uintptr(fds[0]), "userfaultfd"), syncWP)
	if errors.Is(err, uffd.ErrUnsupported) {
		t.Skipf("kernel too old: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.h.Close() })
	for _, a := range []uint64{f.priv, f.shared} {
		if _, err := f.h.Register(a, huge, uffd.ModeWP); err != nil {
			t.Fatal(err)
		}
		if err := f.h.WriteProtect(a, huge); err != nil {
			t.Fatal(err)
		}
	}
	if f.pm, err = Open(f.cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.pm.Close() })
	return f
}

func (f *forker) tell(t *testing.T, c byte) {
	t.Helper()
	if _, err := f.in.Write([]byte{c}); err != nil {
		t.Fatal(err)
	}
}

func (f *forker) done(t *testing.T) {
	t.Helper()
	if !f.out.Scan() || f.out.Text() != "done" {
		t.Fatalf("answer %q", f.out.Text())
	}
}

func (f *forker) fault(t *testing.T, want uint64) {
	t.Helper()
	stop, err := uffd.NewStop()
	if err != nil {
		t.Fatal(err)
	}
	defer stop.Close()
	if err := f.h.Wait(stop); err != nil {
		t.Fatal(err)
	}
	var m [1]uffd.Msg
	if _, err := f.h.Read(m[:]); err != nil || m[0].Address != want {
		t.Fatalf("%+v %v, want %#x", m[0], err, want)
	}
	if err := f.h.Unprotect(want, PageBytes, true); err != nil {
		t.Fatal(err)
	}
}

func (f *forker) armed(t *testing.T, start, end uint64, want bool) {
	t.Helper()
	got, err := f.pm.AllArmed(start, end)
	if err != nil || got != want {
		t.Fatalf("armed [%#x,%#x): %v %v, want %v", start, end, got, err, want)
	}
}

// TestFork: the marks of the parent survive a fork and its own writes fault as
// before; the child's writes to private memory are its own affair, those to
// shared memory change the parent's content unseen.
func TestFork(t *testing.T) {
	f := startForker(t)
	f.tell(t, 'f')
	f.done(t)
	f.armed(t, f.priv, f.priv+huge, true)
	f.armed(t, f.shared, f.shared+huge, true)

	f.tell(t, 'c')
	f.done(t)
	var m [1]uffd.Msg
	if n, err := f.h.Read(m[:]); !errors.Is(err, uffd.ErrAgain) {
		t.Fatalf("the child's write was reported: %d %+v %v", n, m[0], err)
	}
	f.armed(t, f.priv, f.priv+huge, true)
	f.armed(t, f.shared, f.shared+huge, true) // blind, see the package comment
	b := f.peek(t, f.priv+2*PageBytes)
	if b != 'p' {
		t.Fatalf("private memory of the parent reads %q", b)
	}
	if b = f.peek(t, f.shared+2*PageBytes); b != 'c' {
		t.Fatalf("shared memory reads %q", b)
	}

	f.tell(t, 'w')
	f.fault(t, f.priv+PageBytes)
	f.fault(t, f.shared+PageBytes)
	f.done(t)
	f.armed(t, f.priv, f.priv+PageBytes, true)
	f.armed(t, f.priv+PageBytes, f.priv+2*PageBytes, false)
	f.armed(t, f.priv+2*PageBytes, f.priv+huge, true)
	f.armed(t, f.shared+PageBytes, f.shared+2*PageBytes, false)
}

func (f *forker) peek(t *testing.T, addr uint64) byte {
	t.Helper()
	var b [1]byte
	if _, err := unix.ProcessVMReadv(f.cmd.Process.Pid, []unix.Iovec{{Base: &b[0], Len: 1}},
		[]unix.RemoteIovec{{Base: uintptr(addr), Len: 1}}, 0); err != nil {
		t.Fatal(err)
	}
	return b[0]
}

// TestTargetDies: both handles say so, neither hangs.
func TestTargetDies(t *testing.T) {
	f := startForker(t)
	pid := f.cmd.Process.Pid
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	stop, err := uffd.NewStop()
	if err != nil {
		t.Fatal(err)
	}
	defer stop.Close()
	if err := f.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := f.h.Wait(stop, pidfd); !errors.Is(err, uffd.ErrGone) {
		t.Errorf("wait: %v", err)
	}
	_ = f.cmd.Wait()
	if err := f.h.WriteProtect(f.priv, huge); !errors.Is(err, uffd.ErrGone) || !errors.Is(err, unix.ESRCH) {
		t.Errorf("write-protect: %v", err)
	}
	if _, err := f.h.Copy(f.priv, make([]byte, PageBytes), 0); !errors.Is(err, uffd.ErrGone) {
		t.Errorf("copy: %v", err)
	}
	if _, err := f.pm.AllArmed(f.priv, f.priv+huge); !errors.Is(err, ErrGone) {
		t.Errorf("scan: %v", err)
	}
	var e [4]Entry
	if _, err := f.pm.Entries(f.priv, e[:]); !errors.Is(err, ErrGone) {
		t.Errorf("entries: %v", err)
	}
	if _, err := Open(pid); err == nil {
		t.Error("opened the pagemap of a dead process")
	}
}
