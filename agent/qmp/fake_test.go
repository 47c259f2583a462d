package qmp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
)

const greeting = `{"QMP":{"version":{"qemu":{"micro":1,"minor":2,"major":7},"package":"x"},"capabilities":["oob"]}}` + "\r\n"

// fake plays QEMU's part of a session: each command is handed to answer, which
// writes whatever it likes.
type fake struct {
	conn *net.UnixConn
	wg   sync.WaitGroup
}

type command struct {
	Execute   string          `json:"execute"`
	Arguments json.RawMessage `json:"arguments"`
	ID        json.RawMessage `json:"id"`
}

func pair(t *testing.T) (client net.Conn, server *net.UnixConn) {
	t.Helper()
	ours, theirs := socketPair(t)
	client, err := connOf(ours)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := connOf(theirs)
	if err != nil {
		t.Fatal(err)
	}
	return client, conn.(*net.UnixConn)
}

// newFake returns a client in command mode on a fake server. The default
// answer to a command is an empty return.
func newFake(t *testing.T, answer func(w io.Writer, c command) bool) (*Client, *fake) {
	t.Helper()
	client, server := pair(t)
	f := &fake{conn: server}
	f.wg.Go(func() {
		_, _ = io.WriteString(server, greeting)
		dec := json.NewDecoder(server)
		for {
			var c command
			if err := dec.Decode(&c); err != nil {
				return
			}
			if answer == nil || !answer(server, c) {
				reply(server, c, `{}`)
			}
		}
	})
	c, err := NewClient(testContext(t), client)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.Close()
		_ = server.Close()
		f.wg.Wait()
	})
	return c, f
}

func reply(w io.Writer, c command, ret string) {
	fmt.Fprintf(w, "{\"return\": %s, \"id\": %s}\r\n", ret, c.ID)
}

func TestPipelineOutOfOrderAndEvents(t *testing.T) {
	var held []command
	c, _ := newFake(t, func(w io.Writer, c command) bool {
		if c.Execute == "qmp_capabilities" {
			return false
		}
		held = append(held, c)
		if len(held) < 3 {
			return true
		}
		var b strings.Builder
		for i := len(held) - 1; i >= 0; i-- {
			fmt.Fprintf(&b, `{"timestamp":{"seconds":%d,"microseconds":5},"event":"E%d","data":{"n":%d}}`, 100+i, i, i)
			reply(&b, held[i], fmt.Sprint(i))
		}
		_, _ = io.WriteString(w, b.String())
		return true
	})
	ctx := testContext(t)
	all, some, small := c.Subscribe(8), c.Subscribe(8, "E1", "E9"), c.Subscribe(2)
	r, err := Encode("x", struct {
		A string `json:"a"`
	}{"<&>"})
	if err != nil {
		t.Fatal(err)
	}
	calls, err := c.Send(r, r, r)
	if err != nil {
		t.Fatal(err)
	}
	for i, k := range calls {
		got := -1
		if err := k.Wait(ctx, &got); err != nil || got != i {
			t.Errorf("call %d returned %d, %v", i, got, err)
		}
		if err := k.Wait(ctx, &got); err != nil || got != i {
			t.Errorf("waiting again: %d, %v", got, err)
		}
		if string(held[i].Arguments) != `{"a":"<&>"}` {
			t.Errorf("arguments %s", held[i].Arguments)
		}
	}
	for i := 2; i >= 0; i-- {
		e := <-all.C()
		if e.Name != fmt.Sprintf("E%d", i) || string(e.Data) != fmt.Sprintf(`{"n":%d}`, i) ||
			!e.Timestamp.Equal(time.Unix(int64(100+i), 5000)) || e.Received.IsZero() {
			t.Errorf("event %+v", e)
		}
	}
	if e := <-some.C(); e.Name != "E1" {
		t.Errorf("filtered event %+v", e)
	}
	if a, b := <-small.C(), <-small.C(); a.Name != "E1" || b.Name != "E0" || small.Dropped() != 1 {
		t.Errorf("full queue kept %s, %s and counted %d", a.Name, b.Name, small.Dropped())
	}
	some.Close()
	some.Close()
	if _, ok := <-some.C(); ok {
		t.Error("closed subscription delivers")
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if _, ok := <-all.C(); ok {
		t.Error("subscription survives its client")
	}
	if _, ok := <-c.Subscribe(1).C(); ok {
		t.Error("subscription to a closed client")
	}
}

// TestSilence: an answer that never comes is not waited for for ever, and the
// connection is in step afterwards.
func TestSilence(t *testing.T) {
	c, _ := newFake(t, func(_ io.Writer, c command) bool { return c.Execute == "silent" })
	c.answerWithin = 50 * time.Millisecond
	err := c.Execute(context.Background(), "silent", nil, nil)
	if !errors.Is(err, ErrSilent) || !problem.Is(err, problem.Busy) {
		t.Errorf("%v", err)
	}
	if err := c.Execute(context.Background(), "next", nil, nil); err != nil {
		t.Errorf("next: %v", err)
	}
}

// TestCancelledCall: its reply comes late and must not be taken for another's.
func TestCancelledCall(t *testing.T) {
	slow := make(chan command, 1)
	c, f := newFake(t, func(_ io.Writer, c command) bool {
		if c.Execute == "slow" {
			slow <- c
		}
		return c.Execute == "slow"
	})
	ctx, cancel := context.WithCancel(testContext(t))
	r, _ := Encode("slow", nil)
	calls, err := c.Send(r)
	if err != nil {
		t.Fatal(err)
	}
	late := <-slow
	cancel()
	if err := calls[0].Wait(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Fatalf("cancelled: %v", err)
	}
	if err := c.Execute(ctx, "x", nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("context that has ended: %v", err)
	}
	reply(f.conn, late, `"of the slow one"`)
	var out map[string]any
	if err := c.Execute(testContext(t), "next", nil, &out); err != nil || len(out) != 0 {
		t.Errorf("next: %v, %v", out, err)
	}
	if c.late != 1 {
		t.Errorf("%d late replies", c.late)
	}
}

func TestErrorWithoutIDIsTheOldestOnes(t *testing.T) {
	n := 0
	c, _ := newFake(t, func(w io.Writer, c command) bool {
		if c.Execute == "x" {
			if n++; n == 2 {
				_, _ = io.WriteString(w, `{"error":{"class":"GenericError","desc":"JSON parse error"}}`)
				reply(w, c, `{}`)
			}
			return true
		}
		return false
	})
	r, _ := Encode("x", nil)
	calls, err := c.Send(r, r)
	if err != nil {
		t.Fatal(err)
	}
	ctx := testContext(t)
	if err := calls[0].Wait(ctx, nil); err == nil || !strings.Contains(err.Error(), "JSON parse error") {
		t.Errorf("first: %v", err)
	}
	if err := calls[1].Wait(ctx, nil); err != nil {
		t.Errorf("second: %v", err)
	}
}

func TestConnectionLostDuringACommand(t *testing.T) {
	for _, event := range []string{"", `{"event":"SHUTDOWN","data":{"guest":true,"reason":"guest-shutdown"}}`} {
		c, f := newFake(t, func(_ io.Writer, c command) bool { return c.Execute == "x" })
		r, _ := Encode("x", nil)
		calls, err := c.Send(r)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(f.conn, event)
		_ = f.conn.CloseWrite()
		err = calls[0].Wait(testContext(t), nil)
		if !errors.Is(err, ErrLost) || errors.Is(err, ErrExited) != (event != "") {
			t.Errorf("with %q: %v", event, err)
		}
	}
}

func TestSilentPeerIsBusy(t *testing.T) {
	client, server := pair(t)
	defer server.Close()
	begin := time.Now()
	if _, err := NewClient(t.Context(), client); !errors.Is(err, ErrBusy) {
		t.Errorf("silent peer: %v", err)
	}
	if d := time.Since(begin); d > 3*time.Second {
		t.Errorf("noticed after %v", d)
	}
}

// BenchmarkRoundTrip is the time from Send to the noted receipt of a reply and
// to the return of Wait, against a peer that answers at once.
func BenchmarkRoundTrip(b *testing.B) {
	ours, theirs, err := func() (int, int, error) {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		return fds[0], fds[1], err
	}()
	if err != nil {
		b.Fatal(err)
	}
	client, _ := connOf(ours)
	server, _ := connOf(theirs)
	defer server.Close()
	go func() {
		_, _ = io.WriteString(server, greeting)
		buf := make([]byte, 4096)
		for {
			n, err := server.Read(buf)
			if err != nil {
				return
			}
			_, id, _ := strings.Cut(string(buf[:n]), `"id":`)
			_, _ = io.WriteString(server, `{"return": {}, "id": `+strings.TrimSpace(id)+"\r\n")
		}
	}()
	c, err := NewClient(b.Context(), client)
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	r, _ := Encode("stop", nil)
	b.ReportAllocs()
	var hop time.Duration
	for b.Loop() {
		calls, err := c.Send(r)
		if err != nil {
			b.Fatal(err)
		}
		if err := calls[0].Wait(b.Context(), nil); err != nil {
			b.Fatal(err)
		}
		hop += time.Since(calls[0].Done())
	}
	b.ReportMetric(float64(hop.Nanoseconds())/float64(b.N), "ns-hop/op")
}
