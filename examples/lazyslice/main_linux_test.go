package main

import (
	"strings"
	"testing"

	"github.com/go-uffd/uffd/internal/uffdtest"
)

func TestMain(m *testing.M) { uffdtest.Main(m) }

func TestLazyslice(t *testing.T) {
	var out strings.Builder
	if err := run(&out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"request=00058254 at 3728256", "request=00065536 status=503"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing from\n%s", want, out.String())
		}
	}
}
