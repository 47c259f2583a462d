package qmp

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestCutOffInTheWrite: a command half written when its context ends must
// never be carried out, and the next one must.
func TestCutOffInTheWrite(t *testing.T) {
	client, server := pair(t)
	defer server.Close()
	go func() { _, _ = io.WriteString(server, greeting) }()
	ready := make(chan *Client)
	go func() {
		c, err := NewClient(t.Context(), client)
		if err != nil {
			t.Error(err)
		}
		ready <- c
	}()
	dec := json.NewDecoder(server)
	var cmd command
	if err := dec.Decode(&cmd); err != nil {
		t.Fatal(err)
	}
	reply(server, cmd, `{}`)
	c := <-ready
	defer c.Close()

	// Nobody reads: this one fills the socket and stays stuck.
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	err := c.Execute(ctx, "huge", map[string]string{"a": strings.Repeat("x", 2<<20)}, nil)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "in part") {
		t.Fatalf("stuck write: %v", err)
	}
	// And this one does not even begin.
	ctx2, cancel2 := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel2()
	if err := c.Execute(ctx2, "never", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("write behind it: %v", err)
	}
	result := make(chan error, 1)
	go func() { result <- c.Execute(testContext(t), "after", nil, nil) }()
	var got []byte
	buf := make([]byte, 64<<10)
	for !strings.HasSuffix(string(got), "}\n") {
		n, err := server.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, buf[:n]...)
	}
	_, rest, ok := strings.Cut(string(got), "\xff\n")
	if !ok || strings.Contains(string(got), "never") || strings.Count(rest, "execute") != 1 {
		t.Fatalf("on the wire after the torn command: %.200q", got[max(0, len(got)-200):])
	}
	// QEMU's complaint about what was torn belongs to nobody.
	_, _ = io.WriteString(server, `{"error":{"class":"GenericError","desc":"JSON parse error"}}`+"\r\n")
	if err := json.Unmarshal([]byte(rest), &cmd); err != nil {
		t.Fatal(err)
	}
	reply(server, cmd, `{}`)
	if err := <-result; err != nil {
		t.Errorf("command after the torn one: %v", err)
	}
}

func TestDescriptors(t *testing.T) {
	// The server looks for descriptors in what it reads.
	client, server := pair(t)
	defer server.Close()
	_, _ = io.WriteString(server, greeting)
	var wg sync.WaitGroup
	defer wg.Wait()
	got := make(chan int, 8)
	wg.Go(func() {
		buf, oob := make([]byte, 4096), make([]byte, 256)
		for {
			n, oobn, _, _, err := server.ReadMsgUnix(buf, oob)
			if err != nil || n == 0 {
				return
			}
			msgs, _ := unix.ParseSocketControlMessage(oob[:oobn])
			for _, m := range msgs {
				fds, _ := unix.ParseUnixRights(&m)
				for _, fd := range fds {
					got <- fd
				}
			}
			var cmd command
			if err := json.Unmarshal(buf[:n], &cmd); err != nil {
				t.Errorf("%q: %v", buf[:n], err)
				return
			}
			reply(server, cmd, `{}`)
		}
	})
	ctx := testContext(t)
	c, err := NewClient(ctx, client)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := c.ExecuteFD(ctx, "getfd", map[string]string{"fdname": "x"}, nil, w); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	far := os.NewFile(uintptr(<-got), "far")
	if _, err := far.WriteString("through"); err != nil {
		t.Fatal(err)
	}
	_ = far.Close()
	if b, _ := io.ReadAll(r); string(b) != "through" {
		t.Errorf("read %q", b)
	}
	if err := c.ExecuteFD(ctx, "x", nil, nil, r, r); !errors.Is(err, ErrNoFD) {
		t.Errorf("two at once: %v", err)
	}
}

func TestEncode(t *testing.T) {
	for _, args := range []any{[]int{1}, "x", 7, make(chan int)} {
		if _, err := Encode("x", args); err == nil {
			t.Errorf("arguments %v accepted", args)
		}
	}
	for args, want := range map[any]string{
		nil:                             `{"execute":"x","id":9}` + "\n",
		json.Number("null"):             "",
		(*struct{})(nil):                `{"execute":"x","id":9}` + "\n",
		struct{ B bool }{true}:          `{"execute":"x","arguments":{"B":true},"id":9}` + "\n",
		struct{ R any }{[2]string{"a"}}: `{"execute":"x","arguments":{"R":["a",""]},"id":9}` + "\n",
	} {
		r, err := Encode("x", args)
		if want == "" {
			continue
		}
		if err != nil || string(r.append(nil, 9)) != want {
			t.Errorf("%v: %s, %v", args, r.append(nil, 9), err)
		}
	}
}
