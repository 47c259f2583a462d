package libvirt

import (
	"bytes"
	"testing"
)

// FuzzMessage reads whatever a daemon may send.
func FuzzMessage(f *testing.F) {
	d := Domain{Name: "demo", ID: 3}
	var e encoder
	e.uint(1)
	e.domain(d)
	e.string("STOP")
	for range 3 {
		e.uint(7)
	}
	e.present(false)
	h := head{bytes: uint32(headBytes + len(e.b)), program: programQEMU, procedure: procMonitorEvent, kind: kindMessage}
	f.Add(append(h.append(nil), e.b...))
	var refused encoder
	refused.uint(42)
	refused.uint(10)
	refused.present(true)
	refused.string("no domain")
	h = head{bytes: uint32(headBytes + len(refused.b)), kind: kindReply, status: statusError}
	f.Add(append(h.append(nil), refused.b...))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, body, err := readMessage(bytes.NewReader(b))
		if err != nil {
			return
		}
		if len(body) != int(h.bytes)-headBytes {
			t.Fatalf("%d bytes of a message of %d", len(body), h.bytes)
		}
		if h.kind == kindReply && h.status == statusError {
			if decodeError(body) == nil {
				t.Fatal("an error that is none")
			}
		}
		ev, err := decodeEvent(body)
		if err != nil {
			return
		}
		// What was read is what is written, up to what stands behind it.
		var again encoder
		again.b = append(again.b, body[:4]...)
		again.domain(ev.Domain)
		again.string(ev.Name)
		if n := len(again.b); n > len(body) {
			t.Fatalf("event %+v is longer than its message", ev)
		}
	})
}
