package lazymem_test

import (
	"fmt"
	"os"
	"testing"

	"github.com/go-uffd/uffd/internal/uffdtest"
)

// children are what a test starts in a process of its own, by name.
var children = map[string]func() error{
	"matrix":   matrixChild,
	"hazard":   hazardChild,
	"mlockall": mlockallChild,
	"unpriv":   unprivilegedChild,
	"cleanup":  cleanupChild,
}

const childVariable = "LAZYMEM_TEST_CHILD"

func TestMain(m *testing.M) {
	name := os.Getenv(childVariable)
	if name == "" {
		uffdtest.Main(m)
	}
	if err := children[name](); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}
