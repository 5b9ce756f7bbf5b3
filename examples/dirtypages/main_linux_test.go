package main

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/examples/internal/twin"
	"github.com/go-uffd/uffd/internal/uffdtest"
)

func TestMain(m *testing.M) {
	if twin.Second() {
		main()
		os.Exit(0)
	}
	uffdtest.Main(m)
}

func TestDirtypages(t *testing.T) {
	for _, c := range []struct {
		sync bool
		need uffd.Features
		want string
	}{
		{true, uffd.FeaturePagefaultFlagWP, "7 of 64 pages written (sync): [0 1 2 17 40 41 63]\n2 of 64 pages written (sync): [2 3]\n"},
		{false, uffd.FeatureWPAsync, "7 of 64 pages written (async): [0 1 2 17 40 41 63]\n2 of 64 pages written (async): [2 3]\n"},
	} {
		t.Run(fmt.Sprintf("sync=%v", c.sync), func(t *testing.T) {
			uffdtest.Require(t, c.need)
			var out strings.Builder
			if err := report(c.sync, &out); err != nil {
				t.Fatal(err)
			}
			if out.String() != c.want {
				t.Errorf("printed %q, want %q", &out, c.want)
			}
		})
	}
}
