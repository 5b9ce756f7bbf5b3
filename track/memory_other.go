//go:build !linux

package track

import (
	"errors"

	"github.com/go-uffd/uffd"
)

func readMemory(int, []byte, uffd.Addr) error { return errors.ErrUnsupported }

func readable(*uffd.File) bool { return true }
