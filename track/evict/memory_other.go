//go:build !linux

package evict

import (
	"errors"
	"os"

	"github.com/go-uffd/uffd"
)

func checkMapping(int, uffd.Range, *os.File) error { return errors.ErrUnsupported }

func reopen(*os.File) (*os.File, error) { return nil, errors.ErrUnsupported }

func allocate(*os.File, int64) error { return errors.ErrUnsupported }

func punch(*os.File, int64, int64) error { return errors.ErrUnsupported }

func nextPage(*os.File, int64) (int64, error) { return 0, errors.ErrUnsupported }
