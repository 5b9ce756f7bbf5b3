package uffd_test

import (
	"testing"

	"github.com/go-uffd/uffd/internal/uffdtest"
)

func TestMain(m *testing.M) {
	uffdtest.Main(m,
		uffdtest.Role{Name: "open", Run: openRole},
		uffdtest.Role{Name: "populate", Run: populateRole},
	)
}
