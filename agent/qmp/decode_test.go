package qmp

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
)

func TestLargeRepliesInPieces(t *testing.T) {
	const size = 12 << 20
	text := strings.Repeat(`q\"\\}{`, size/7)
	c, _ := newFake(t, func(w io.Writer, c command) bool {
		if c.Execute == "big" {
			reply(w, c, `"`+text+`"`)
			return true
		}
		return false
	})
	var out string
	if err := c.Execute(testContext(t), "big", nil, &out); err != nil {
		t.Fatal(err)
	}
	if out != strings.Repeat(`q"\}{`, size/7) {
		t.Fatalf("%d bytes came, and not the right ones", len(out))
	}
}

func TestNotQMP(t *testing.T) {
	for _, first := range []string{"QEMU 7.2.0 monitor - type 'help' for more information\r\n(qemu) ", "RFB 003.008\n",
		"[1]", "}", `"x"`, `{"QMP":7}`} {
		client, server := pair(t)
		_, _ = io.WriteString(server, first)
		_, err := NewClient(testContext(t), client)
		if !errors.Is(err, ErrProtocol) {
			t.Errorf("%q: %v", first, err)
		}
		_ = server.Close()
	}
}

func TestMessageTooLarge(t *testing.T) {
	s := newSplitter()
	s.max = 100 << 10
	r := io.MultiReader(strings.NewReader(`{"return":"`), zeros{})
	for {
		buf, err := s.space()
		if err != nil {
			if !errors.Is(err, ErrTooLarge) {
				t.Errorf("%v", err)
			}
			break
		}
		n, _ := r.Read(buf)
		s.fill(n)
		if msg, err := s.next(); msg != nil || err != nil {
			t.Fatalf("%.20q, %v", msg, err)
		}
		if len(s.buf) > 1<<20 {
			t.Fatal("it keeps growing")
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = '0'
	}
	return len(p), nil
}

func FuzzSplitter(f *testing.F) {
	f.Add([]byte(greeting+`{"return": {}, "id": 1}`+"\r\n"+`{"event":"STOP","timestamp":{"seconds":1,"microseconds":2}}`), 7)
	f.Add([]byte(`{"a":"\"}{\\","b":[{},[]]}  {}`), 1)
	f.Add([]byte("{\n    \"return\": [\n    ]\n}\n"), 3)
	f.Fuzz(func(t *testing.T, data []byte, step int) {
		if step <= 0 {
			step = 1
		}
		whole, err1 := split(data, len(data)+1)
		pieces, err2 := split(data, step)
		if fmt.Sprint(err1) != fmt.Sprint(err2) && (err1 == nil || err2 == nil) {
			t.Fatalf("whole: %v, in pieces: %v", err1, err2)
		}
		if fmt.Sprintf("%q", whole) != fmt.Sprintf("%q", pieces) {
			t.Fatalf("whole: %q, in pieces: %q", whole, pieces)
		}
		for _, msg := range whole {
			m, ok := parseMessage([]byte(msg))
			var ref map[string]json.RawMessage
			if json.Unmarshal([]byte(msg), &ref) != nil {
				continue // must only not crash
			}
			if !ok {
				t.Fatalf("%q is JSON, but was not understood", msg)
			}
			if strings.Contains(msg, `\`) {
				continue // escaped keys are not QEMU's
			}
			for key, got := range map[string][]byte{"id": m.id, "return": m.ret, "error": m.err, "event": m.event} {
				if string(ref[key]) != string(got) {
					t.Fatalf("%q: %s is %q, not %q", msg, key, got, ref[key])
				}
			}
		}
	})
}

func split(data []byte, step int) (msgs []string, err error) {
	s := newSplitter()
	for len(data) > 0 {
		buf, err := s.space()
		if err != nil {
			return msgs, err
		}
		n := copy(buf, data[:min(step, len(data))])
		data = data[n:]
		s.fill(n)
		for {
			msg, err := s.next()
			if err != nil {
				return msgs, err
			}
			if msg == nil {
				break
			}
			msgs = append(msgs, string(msg))
		}
	}
	return msgs, nil
}
