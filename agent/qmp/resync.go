package qmp

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"time"
)

// Resync brings a connection whose former user died in the middle of something
// back in step, and leaves it in command mode with nothing unread that matters:
// the next bytes to come are events or the reply to what is sent next.
//
// There may be half a command on the wire, unread replies in front of us, and
// the first of them may have been read in part. So: 0xFF makes QEMU's parser
// throw away what it has (even inside a string), then a command with an id no
// one else can have used, and everything up to its reply is thrown away. That
// command is qmp_capabilities, because either answer (done, or not needed any
// more) means command mode.
//
// What had been sent completely is carried out before Resync returns, since
// QEMU works in order. ctx should carry a deadline: a QEMU that hangs answers
// nothing. Nobody else may read from the socket meanwhile. On an error the
// connection is of no use any more, except that Resync may be tried again.
func Resync(ctx context.Context, conn net.Conn) (err error) {
	token := "ckagent-resync-" + rand.Text()
	defer func() {
		if err != nil {
			err = fmt.Errorf("qmp resync: %w", err)
		}
	}()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	fired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = conn.SetDeadline(time.Unix(1, 0))
		close(fired)
	})
	defer func() {
		if !stop() {
			<-fired
		}
		_ = conn.SetDeadline(time.Time{})
	}()
	_ = conn.SetDeadline(time.Time{})
	probe := append([]byte{0xff, '\n'}, `{"execute":"qmp_capabilities","id":"`+token+"\"}\n"...)
	if _, err := conn.Write(probe); err != nil {
		return resyncError(ctx, err)
	}
	// QEMU ends every message with a newline and has none inside one, unless
	// the monitor is pretty: then the object closes on a line of its own.
	quoted := []byte(`"` + token + `"`)
	var line []byte // the line under way, only its ends if it is long
	buf := make([]byte, 64<<10)
	pretty := false
	for {
		n, err := conn.Read(buf)
		for rest := buf[:n]; len(rest) > 0; {
			part, after, whole := bytes.Cut(rest, []byte{'\n'})
			rest = after
			line = append(line, part...)
			if !whole {
				// Our reply is short; of a long line of somebody else's only the
				// first byte and the end can matter.
				if len(line) > 8<<10 {
					line = append(line[:1], line[len(line)-1<<10:]...)
				}
				break
			}
			text := bytes.TrimRight(line, "\r")
			mine := bytes.Contains(text, quoted)
			switch {
			case mine && bytes.HasPrefix(text, []byte("{")), pretty && bytes.Equal(text, []byte("}")):
				return nil
			case mine:
				pretty = true
			}
			line = line[:0]
		}
		if err != nil {
			return resyncError(ctx, err)
		}
	}
}

func resyncError(ctx context.Context, err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return &lostError{cause: err}
}
