//go:build !linux

package track

import (
	"errors"
	"fmt"

	"github.com/go-uffd/uffd"
)

func (p *Pagemap) scan(*Scan, []Region) (int, uffd.Addr, error) {
	return 0, 0, fmt.Errorf("PAGEMAP_SCAN exists on Linux only: %w", errors.ErrUnsupported)
}
