package evict

import (
	"testing"

	"github.com/go-uffd/uffd/internal/uffdtest"
)

func TestMain(m *testing.M) { uffdtest.Main(m) }
