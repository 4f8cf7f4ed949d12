/* wide.h - 128 bits, which ISO C has no name for. */
#ifndef EPOCHD_LOAD_WIDE_H
#define EPOCHD_LOAD_WIDE_H

__extension__ typedef unsigned __int128 u128;

#endif
