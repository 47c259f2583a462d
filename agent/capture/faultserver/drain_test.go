package faultserver

import (
	"sync"
	"testing"
	"time"
)

// drain collects what the rings bring until each has ended or stop is closed.
func drain(t *testing.T, c *Client, out []byte, stop <-chan struct{}) (pages uint64) {
	t.Helper()
	seen := make([]bool, len(out)/pageBytes)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range c.Arena().Rings() {
		r := c.Arena().Ring(i)
		wg.Go(func() {
			for {
				rec, ok, done, err := r.Next(20 * time.Millisecond)
				if err != nil {
					t.Error(err)
					return
				}
				if done {
					return
				}
				if !ok {
					select {
					case <-stop:
						return
					default:
						continue
					}
				}
				mu.Lock()
				for p := rec.First; p < rec.First+rec.Pages; p++ {
					if seen[p] {
						t.Errorf("page %d arrived twice", p)
					}
					seen[p] = true
					pages++
				}
				mu.Unlock()
				if to := out[rec.First*pageBytes:][:rec.Pages*pageBytes]; rec.Data != nil {
					copy(to, rec.Data)
				} else if !rec.Same {
					clear(to)
				}
				r.Done()
			}
		})
	}
	wg.Wait()
	return pages
}

// drainAll drains until the capture has ended, be it by a failure, in which case no
// ring brings its end.
func drainAll(t *testing.T, c *Client, out []byte) (pages uint64, err error) {
	t.Helper()
	stop := make(chan struct{})
	drained := make(chan struct{})
	go func() { // joined below
		defer close(drained)
		pages = drain(t, c, out, stop)
	}()
	if err = c.Wait(t.Context()); err != nil {
		close(stop)
	}
	<-drained
	return pages, err
}
