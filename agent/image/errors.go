package image

import (
	"fmt"

	"github.com/ckagent/ckagent/agent/problem"
)

// corrupt is the error for stored data that is not what was written.
func corrupt(op, object, format string, args ...any) *problem.Error {
	return problem.New(problem.Integrity, op, object, format, args...).
		WithHint("this checkpoint is damaged: restore another one, and check the disk under the store")
}

// at names a place in a file.
func at(path string, off int64) string { return fmt.Sprintf("%s at offset %d", path, off) }
