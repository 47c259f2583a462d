//go:build !amd64

package doctor

import (
	"context"
	"errors"
)

func gatherKVM(context.Context) KVMFacts {
	return KVMFacts{OpenErr: errors.New("examined on x86-64 only")}
}
