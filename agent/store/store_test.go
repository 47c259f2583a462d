package store_test

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/image/fsys/memfs"
	"github.com/ckagent/ckagent/agent/store/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestDirectory(t *testing.T) {
	storetest.Run(t, func(t *testing.T) (fsys.FS, string) { return fsys.OS{}, t.TempDir() + "/deep/store" })
}

func TestMemory(t *testing.T) {
	storetest.Run(t, func(t *testing.T) (fsys.FS, string) { return memfs.New(1 << 30), "/store" })
}
