package qmp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"
)

// start registers the commands and writes them, within limit if there is one,
// which comes cheaper than a context with a deadline.
func (c *Client) start(ctx context.Context, limit time.Duration, reqs []*Request, files []*os.File) ([]*Call, error) {
	if len(files) > 1 {
		return nil, ErrNoFD // QEMU keeps the first and closes the others, unasked
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("not sent: %w", context.Cause(ctx))
	}
	if err := c.lock(ctx, limit); err != nil {
		return nil, fmt.Errorf("not sent: %w", err)
	}
	defer func() { <-c.sem }()

	c.out = c.out[:0]
	if c.torn {
		c.out = append(c.out, 0xff, '\n')
	}
	block := make([]Call, len(reqs))
	calls := make([]*Call, len(reqs))
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return nil, c.err
	}
	for i, r := range reqs {
		c.nextID++
		block[i] = Call{c: c, id: c.nextID, command: r.command, done: make(chan struct{})}
		calls[i] = &block[i]
		c.pending[c.nextID] = calls[i]
		c.out = r.append(c.out, c.nextID)
	}
	if c.torn && len(reqs) > 0 {
		c.stray = calls[0].id
	}
	c.mu.Unlock()

	now := time.Now()
	for _, k := range calls {
		k.sent = now
	}
	n, err := c.write(ctx, limit, now, files)
	if cap(c.out) > keepBytes {
		c.out = nil
	}
	if err == nil {
		c.torn = false
		return calls, nil
	}
	for _, k := range calls {
		c.forget(k)
	}
	// QEMU's parser saw n bytes of this. Nothing at all, or only the reset:
	// nothing has changed.
	c.torn = c.torn || n > 0
	if errors.Is(err, os.ErrDeadlineExceeded) {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		if n == 0 {
			return nil, fmt.Errorf("not sent: %w", err)
		}
		return nil, fmt.Errorf("sent in part, QEMU may carry out what it got: %w", err)
	}
	if errors.Is(err, ErrNoFD) {
		return nil, err
	}
	// The reader knows best what happened, and is about to learn it.
	select {
	case <-c.done:
		return nil, c.Err()
	case <-ctx.Done():
		return nil, &lostError{cause: err}
	}
}

// write puts c.out on the wire, descriptors with its first byte.
func (c *Client) write(ctx context.Context, limit time.Duration, now time.Time, files []*os.File) (int, error) {
	var deadline time.Time
	if limit > 0 {
		deadline = now.Add(limit)
	}
	_ = c.conn.SetWriteDeadline(deadline)
	if ctx.Done() != nil {
		fired := make(chan struct{})
		stop := context.AfterFunc(ctx, func() {
			_ = c.conn.SetWriteDeadline(time.Unix(1, 0))
			close(fired)
		})
		defer func() {
			if !stop() {
				<-fired
			}
		}()
	}
	done := 0
	if len(files) > 0 {
		uc, ok := c.conn.(*net.UnixConn)
		if !ok {
			return 0, ErrNoFD
		}
		n, err := sendFile(uc, c.out, files[0])
		if err != nil {
			return n, err
		}
		done = n
	}
	n, err := c.conn.Write(c.out[done:])
	return done + n, err
}

// lock takes the right to write.
func (c *Client) lock(ctx context.Context, limit time.Duration) error {
	select {
	case c.sem <- struct{}{}: // the ordinary case needs no timer
		return nil
	default:
	}
	var expired <-chan time.Time
	if limit > 0 {
		timer := time.NewTimer(limit)
		defer timer.Stop()
		expired = timer.C
	}
	select {
	case c.sem <- struct{}{}:
		return nil
	case <-expired:
		return os.ErrDeadlineExceeded
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
