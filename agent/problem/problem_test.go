package problem

import (
	"context"
	"errors"
	"fmt"
	"testing"
)

func TestAnErrorNeverExitsWithZero(t *testing.T) {
	for _, c := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errors.New("plain"), 1},
		{&Error{Op: "resume pager"}, 1}, // its code was lost on the way between processes
		{&Error{Code: "of a later version"}, 1},
		{fmt.Errorf("wrapped: %w", New(Refused, "attach", "", "no")), 3},
		{fmt.Errorf("wrapped: %w", context.Canceled), 130},
	} {
		if got := ExitCode(c.err); got != c.want {
			t.Errorf("%#v: %d, want %d", c.err, got, c.want)
		}
	}
}
