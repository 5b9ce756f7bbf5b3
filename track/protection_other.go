//go:build !linux

package track

import "errors"

func checkProtection() error { return errors.ErrUnsupported }
