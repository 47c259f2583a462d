package fsys

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
)

func TestWriteVec(t *testing.T) {
	name := filepath.Join(t.TempDir(), "f")
	f, err := OS{}.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var bufs [][]byte
	var want []byte
	for i := range 2*maxVec + 3 { // more than one vector
		b := bytes.Repeat([]byte{byte(i)}, i%5*1000)
		bufs = append(bufs, b)
		want = append(want, b...)
	}
	if err := f.WriteVec(bufs, 4096); err != nil {
		t.Fatal(err)
	}
	f.StartWriteback(0, 4096)
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	got, err := ReadFileLimit(OS{}, name, 1<<30)
	if err != nil || !bytes.Equal(got[4096:], want) || len(bytes.Trim(got[:4096], "\x00")) != 0 {
		t.Errorf("%d bytes of %d, %v", len(got), len(want)+4096, err)
	}
	if _, err := ReadFileLimit(OS{}, name, 100); !errors.Is(err, ErrTooLarge) {
		t.Errorf("got %v", err)
	}
	if _, err := (OS{}).Create(name); !errors.Is(err, fs.ErrExist) {
		t.Errorf("created over an existing file: %v", err)
	}
	small := bufs[1:9]
	if n := testing.AllocsPerRun(20, func() {
		if err := f.WriteVec(small, 0); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations a write", n)
	}
}

func TestWriteVecErrors(t *testing.T) {
	fd, err := unix.MemfdCreate("x", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	var iov [4]unix.Iovec
	n, err := writeVec(fd, iov[:0], [][]byte{[]byte("abc"), nil, []byte("defg")}, 2)
	if err != nil || n != 7 {
		t.Errorf("%d, %v", n, err)
	}
	if _, err := writeVec(-1, iov[:0], [][]byte{[]byte("abc")}, 0); err != unix.EBADF {
		t.Errorf("got %v", err)
	}
	// /dev/full takes nothing.
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	if _, err := writeVec(int(full.Fd()), iov[:0], [][]byte{[]byte("abc")}, 0); err != unix.ENOSPC {
		t.Errorf("got %v", err)
	}
}

func TestOpenRefusesWhatIsNoFile(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/file", []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("file", dir+"/link"); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(dir+"/fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"link", "fifo", ".", "none"} {
		if f, err := (OS{}).Open(filepath.Join(dir, name)); err == nil {
			f.Close()
			t.Errorf("%s was opened", name)
		}
	}
	f, err := OS{}.Open(dir + "/file")
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
}

func TestLock(t *testing.T) {
	name := t.TempDir() + "/lock"
	l, err := OS{}.TryLock(name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (OS{}).TryLock(name); !errors.Is(err, ErrLocked) {
		t.Errorf("got %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if l, err = (OS{}).TryLock(name); err != nil {
		t.Fatal(err)
	}
	l.Close()
}

func TestProblem(t *testing.T) {
	if Problem("x", "y", nil) != nil {
		t.Error("no error became one")
	}
	for errno, code := range map[unix.Errno]problem.Code{
		unix.ENOSPC: problem.Store, unix.EROFS: problem.Store, unix.ENOTCONN: problem.Store,
		unix.EINVAL: problem.Failed, unix.ENOENT: problem.Failed,
	} {
		err := Problem("write", "f", &fs.PathError{Op: "write", Path: "f", Err: errno})
		if !problem.Is(err, code) || !errors.Is(err, errno) {
			t.Errorf("%v: %v (%s)", errno, err, problem.CodeOf(err))
		}
		if again := Problem("other", "g", err); again != err {
			t.Errorf("a problem became another one: %v", again)
		}
	}
}
