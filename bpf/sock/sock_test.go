package sock

import (
	"io"
	"net"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestTransfers of this process over loopback, with pauses of known length.
func TestTransfers(t *testing.T) {
	m, err := Load()
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}()
	a, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := net.Dial("udp", a.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	const gap, n = 10 * time.Millisecond, 10
	if err := m.Attach(os.Getpid(), gap); err != nil {
		t.Fatal(err)
	}
	if err := m.Attach(os.Getpid(), gap); err == nil {
		t.Error("attached twice")
	}
	buf := make([]byte, 2000)
	r, w := io.Pipe() // no socket, not counted
	defer r.Close()
	defer w.Close()
	for range n {
		if _, err := b.Write(buf[:1000]); err != nil {
			t.Fatal(err)
		}
		if _, _, err := a.ReadFrom(buf); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * gap)
	}
	got, err := m.Read(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if got.CallsOut != n || got.CallsIn != n || got.BytesOut != 1000*n || got.BytesIn != 1000*n {
		t.Errorf("%+v", got)
	}
	if got.Slots != n || got.IdleSince == 0 || got.Idle < (n-1)*3*gap {
		t.Errorf("%d slots, idle %v, since %v", got.Slots, got.Idle, got.IdleSince)
	}
	if err := m.Detach(os.Getpid()); err != nil {
		t.Error(err)
	}
}
