package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// rawSession connects by hand, up to command mode.
func rawSession(t *testing.T, sock string, negotiate bool) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	// One byte at a time, so that nothing beyond the answer is read.
	r := json.NewDecoder(bufio.NewReaderSize(oneByte{conn}, 16))
	var v any
	if err := r.Decode(&v); err != nil {
		t.Fatal(err)
	}
	if negotiate {
		if _, err := conn.Write([]byte(`{"execute":"qmp_capabilities"}`)); err != nil {
			t.Fatal(err)
		}
		if err := r.Decode(&v); err != nil {
			t.Fatal(err)
		}
	}
	return conn
}

type oneByte struct{ r io.Reader }

func (o oneByte) Read(p []byte) (int, error) { return o.r.Read(p[:1]) }

func write(t *testing.T, w io.Writer, s string) {
	t.Helper()
	if _, err := io.WriteString(w, s); err != nil {
		t.Fatal(err)
	}
}

// TestResyncAtEveryByte leaves every beginning of several commands on the wire,
// with replies unread and half read, and requires that the connection works
// afterwards, that nothing cut was carried out, and that what was whole was.
func TestResyncAtEveryByte(t *testing.T) {
	for _, pretty := range []bool{false, true} {
		t.Run(map[bool]string{false: "compact", true: "pretty"}[pretty], func(t *testing.T) {
			opt := "-qmp"
			if pretty {
				opt = "-qmp-pretty"
			}
			ctx := testContext(t)
			sock := filepath.Join(t.TempDir(), "q.sock")
			startQEMU(t, "/", sock, nil, opt, "unix:"+sock+",server=on,wait=off")
			for _, command := range []string{
				`{"execute":"cont","id":7}`,
				`{"execute":"object-add","arguments":{"qom-type":"rng-builtin","id":"\"a}\\{"},"id":"x\u00e9"}`,
			} {
				for cut := 0; cut <= len(command); cut++ {
					for _, unread := range []int{0, 1, 3} {
						if pretty && unread == 1 {
							continue
						}
						resyncOnce(ctx, t, sock, command, cut, unread)
					}
				}
			}
		})
	}
}

func resyncOnce(ctx context.Context, t *testing.T, sock, command string, cut, unread int) {
	t.Helper()
	conn := rawSession(t, sock, true)
	defer conn.Close()
	for i := range unread {
		write(t, conn, fmt.Sprintf(`{"execute":"query-version","id":"old%d"}`+"\n", i))
	}
	if unread > 0 { // the first of them was read in part
		if _, err := io.ReadFull(conn, make([]byte, 3+cut)); err != nil {
			t.Fatal(err)
		}
	}
	write(t, conn, command[:cut])
	c, err := AdoptClient(ctx, conn)
	if err != nil {
		t.Fatalf("cut at %d (%q), %d unread: %v", cut, command[:cut], unread, err)
	}
	defer c.Close()
	var st struct{ Running bool }
	if err := c.Execute(ctx, "query-status", nil, &st); err != nil {
		t.Fatalf("cut at %d: %v", cut, err)
	}
	whole := cut == len(command)
	isCont := strings.Contains(command, "cont")
	if st.Running != (whole && isCont) {
		t.Fatalf("cut at %d (%q): running %v", cut, command[:cut], st.Running)
	}
	if st.Running {
		if err := c.Execute(ctx, "stop", nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	c.mu.Lock()
	late := c.late
	c.mu.Unlock()
	if late != 0 {
		t.Fatalf("cut at %d: %d replies came after Resync had returned", cut, late)
	}
}

// TestResyncBeforeNegotiation: the owner died right after connecting.
func TestResyncBeforeNegotiation(t *testing.T) {
	ctx := testContext(t)
	sock := filepath.Join(t.TempDir(), "q.sock")
	startQEMU(t, "/", sock, nil, qmpAt(sock)...)
	conn := rawSession(t, sock, false)
	write(t, conn, `{"execute":"qmp_cap`)
	c, err := AdoptClient(ctx, conn)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Execute(ctx, "query-status", nil, nil); err != nil {
		t.Error(err)
	}
}

// TestResyncOfDuplicate is what happens when an owner dies: a duplicate of its
// socket goes on where it stopped.
func TestResyncOfDuplicate(t *testing.T) {
	ctx := testContext(t)
	sock := filepath.Join(t.TempDir(), "q.sock")
	startQEMU(t, "/", sock, nil, append(qmpAt(sock), "-machine", "pc", "-m", "16")...)
	owner := rawSession(t, sock, true)
	dup, err := dupConn(owner)
	if err != nil {
		t.Fatal(err)
	}
	// Several MiB nobody has read, and half a command.
	write(t, owner, `{"execute":"human-monitor-command","arguments":{"command-line":"xp /200000bx 0"},"id":1}`+
		`{"execute":"cont","id":2}{"execute":"stop","id":3}{"execute":"human-monitor-`)
	_ = owner.Close()
	conn, err := net.FileConn(dup)
	_ = dup.Close()
	if err != nil {
		t.Fatal(err)
	}
	c, err := AdoptClient(ctx, conn)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var st struct{ Status string }
	if err := c.Execute(ctx, "query-status", nil, &st); err != nil || st.Status != "paused" {
		t.Errorf("%+v, %v", st, err)
	}
}

func TestResyncGivesUp(t *testing.T) {
	a, b := net.Pipe()
	defer b.Close()
	go func() { _, _ = io.Copy(io.Discard, b) }()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if err := Resync(ctx, a); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("silent peer: %v", err)
	}
	_ = a.Close()
	if err := Resync(t.Context(), a); !errors.Is(err, ErrLost) {
		t.Errorf("closed connection: %v", err)
	}
	if err := Resync(ctx, a); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrExist) {
		t.Errorf("context that has ended: %v", err)
	}
}
