//go:build !linux

package pager

import (
	"errors"
	"os"

	"github.com/go-uffd/uffd"
)

// NewState makes an empty file for [Pager.AttachState]. Only Linux has them.
func NewState() (*os.File, error) { return nil, errors.ErrUnsupported }

func openLedger(*os.File, []Region) (*ledger, error) { return nil, errors.ErrUnsupported }

type ledgerReader struct{}

func (l *ledger) readFrom(*uffd.File) error { return errors.ErrUnsupported }

func (l *ledger) read() ([]uffd.Msg, error) { return nil, errors.ErrUnsupported }

func (l *ledger) close() {}
