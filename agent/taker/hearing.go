package taker

import (
	"io"
	"os"
	"strings"
	"sync"
	"time"
)

// hearing keeps the end of what a child and its helpers say on standard error. It lasts as
// long as any of them.
type hearing struct {
	r    *os.File
	done chan struct{}

	mu sync.Mutex
	b  []byte
}

func hear(r *os.File) *hearing {
	h := &hearing{r: r, done: make(chan struct{})}
	go func() { // joined by wait
		defer close(h.done)
		_, _ = io.Copy(h, r) // its end is all that can happen
		_ = r.Close()
	}()
	return h
}

// Write keeps the last words.
func (h *hearing) Write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.b = append(h.b, p...)
	if n := len(h.b) - lastWords; n > 0 {
		h.b = append(h.b[:0], h.b[n:]...)
	}
	return len(p), nil
}

// text is what was said so far, on one line.
func (h *hearing) text() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return strings.ToValidUTF8(strings.Join(strings.Fields(string(h.b)), " "), "?")
}

// wait reports whether everybody ended within the limit. Nothing is heard afterwards.
func (h *hearing) wait(limit time.Duration) (all bool) {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-h.done:
		return true
	case <-timer.C:
		_ = h.r.SetReadDeadline(time.Unix(1, 0)) // a pipe has deadlines
		<-h.done
		return false
	}
}
