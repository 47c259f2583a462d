package passfd

import (
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// pair is both ends, the second as the child has it.
func pair(t *testing.T) (ours, theirs *net.UnixConn) {
	t.Helper()
	ours, f, err := Pair("test")
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Dup(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if theirs, err = Inherited(uintptr(fd), "test"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ours.Close(); theirs.Close() })
	return ours, theirs
}

// pipe's read end sees the end of the last reference to the write end.
func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

// Messages stay apart, and a file arrives though its sender has gone.
func TestMessagesAndFiles(t *testing.T) {
	ours, theirs := pair(t)
	r, w := pipe(t)
	for i := range 3 {
		var files []*os.File
		if i == 1 {
			files = append(files, w, w)
		}
		if err := Send(ours, i, files...); err != nil {
			t.Fatal(err)
		}
	}
	w.Close()
	ours.Close()
	buf := make([]byte, MaxBytes)
	for i := range 3 {
		got := -1
		files, err := Receive(theirs, buf, &got)
		if err != nil || got != i || len(files) != i%2*2 {
			t.Fatalf("message %d: %d, %d files, %v", i, got, len(files), err)
		}
		if len(files) > 0 {
			if _, err := files[1].WriteString("here"); err != nil {
				t.Error(err)
			}
			if err := Close(files); err != nil {
				t.Error(err)
			}
		}
	}
	if _, err := Receive(theirs, buf, new(int)); !errors.Is(err, io.EOF) {
		t.Errorf("nobody there: %v", err)
	}
	if b, err := io.ReadAll(r); err != nil || string(b) != "here" {
		t.Errorf("the pipe has %q, %v", b, err)
	}
}

// What nobody receives any more is closed with the connection, and so is what comes with a
// message that makes no sense.
func TestNothingIsLeftOpen(t *testing.T) {
	for name, end := range map[string]func(t *testing.T, ours, theirs *net.UnixConn){
		"never read": func(t *testing.T, ours, theirs *net.UnixConn) { theirs.Close(); ours.Close() },
		"not what was expected": func(t *testing.T, ours, theirs *net.UnixConn) {
			files, err := Receive(theirs, make([]byte, MaxBytes), new(int))
			if err == nil || len(files) > 0 {
				t.Errorf("taken for a number, with %d files: %v", len(files), err)
			}
		},
		"cut off": func(t *testing.T, ours, theirs *net.UnixConn) {
			files, err := Receive(theirs, make([]byte, 3), new(string))
			if !errors.Is(err, unix.EMSGSIZE) || len(files) > 0 {
				t.Errorf("%d files, %v", len(files), err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := pair(t)
			r, w := pipe(t)
			if err := Send(ours, "a word", w); err != nil {
				t.Fatal(err)
			}
			w.Close()
			end(t, ours, theirs)
			if b, err := io.ReadAll(r); err != nil || len(b) > 0 {
				t.Errorf("%q, %v", b, err)
			}
		})
	}
}

func TestWhatIsTooMuchIsNotSent(t *testing.T) {
	ours, _ := pair(t)
	_, w := pipe(t)
	if err := Send(ours, strings.Repeat("x", MaxBytes)); !errors.Is(err, unix.EMSGSIZE) {
		t.Errorf("too long: %v", err)
	}
	if err := Send(ours, 1, w, w, w, w, w, w, w, w, w); !errors.Is(err, unix.EMSGSIZE) {
		t.Errorf("too many files: %v", err)
	}
}

// Who sends to nobody hears of it.
func TestPeerHasGone(t *testing.T) {
	ours, theirs := pair(t)
	theirs.Close()
	if err := Send(ours, 1); !errors.Is(err, unix.EPIPE) {
		t.Errorf("%v, want EPIPE", err)
	}
}
