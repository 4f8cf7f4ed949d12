/* mutant.h - deliberate bugs, to show that the simulator (tests/sim) finds such bugs. Without
 * EPOCHD_MUTANTS, which only its build defines, mutant() is 0 and nothing is compiled. */
#ifndef EPOCHD_MUTANT_H
#define EPOCHD_MUTANT_H

enum mutant {
    MUTANT_NONE,
    MUTANT_NO_COMMIT_SYNC,        /* acknowledge without fdatasync */
    MUTANT_SYNC_BEFORE_WRITES,    /* fdatasync while the record's writes are in flight */
    MUTANT_IGNORE_WRITE_ERROR,    /* acknowledge after a failed journal write */
    MUTANT_IGNORE_SYNC_ERROR,     /* acknowledge after a failed journal fdatasync */
    MUTANT_IGNORE_OTHERS_SYNC,    /* a failed flush concerns only who asked for it */
    MUTANT_NO_IMAGE_SYNC,         /* move the head without fdatasync of the images */
    MUTANT_IGNORE_IMAGE_ERROR,    /* move the head after a failed fdatasync of an image */
    MUTANT_HEAD_BEFORE_APPLY,     /* move the head before anything is applied */
    MUTANT_REUSE_BEFORE_HEAD,     /* overwrite records before the head's move is durable */
    MUTANT_APPLY_BACKWARDS,       /* of two versions of a block the older one */
    MUTANT_MERGE_OLDER_THAN_ZEROES, /* blocks of epochs before a zero range, after it */
    MUTANT_MERGE_DROPS_PARTS,     /* a newer part of a block hides all of an older version */
    MUTANT_ZEROES_UNORDERED,      /* blocks do not wait for zero ranges */
    MUTANT_NO_SUPER_SYNC,         /* superblock without fdatasync */
    MUTANT_SUPER_ONE_SLOT,        /* always the same superblock slot */
    MUTANT_SUPER_NEXT_SLOT,       /* after a failed write, the other slot */
    MUTANT_NO_VOID_ON_DISCARD,    /* leave a failed commit's record at the tail */
    MUTANT_NO_VOID_ON_RECOVERY,   /* leave a torn record at the tail */
    MUTANT_SKIP_FRAME_CRC,        /* trust the frames of a record */
    MUTANT_SKIP_TABLE_CRC,        /* trust the table of a record */
    MUTANT_NO_RECOVERY_REWRITE,   /* believe the cache, without the arena */
    MUTANT_BELIEVE_RECORD,        /* believe the cache, with the arena */
    MUTANT_REUSE_IDS,             /* after a reboot, go on with the next id */
    MUTANT_ID_BEFORE_LIMIT,       /* use ids before they are reserved */
    MUTANT_CONDENSE_KEEPS_OLDEST, /* of several epochs in a record the oldest version */
    MUTANT_CONDENSE_DROPS_PARTS,  /* in a record, a newer part of a block hides all of it */
    MUTANT_CONDENSE_WITHOUT_RANGES, /* a record without frames of zero ranges */
    MUTANT_SPILL_UNCOPIED,        /* spilled segments of a record from the file's mapping */
    MUTANT_FORGET_SEQ,            /* number frames from 1 after a restart */
    MUTANT_COUNT
};

#ifdef EPOCHD_MUTANTS
extern enum mutant mutant_active;
#define mutant(which) (mutant_active == (which))
#else
#define mutant(which) 0
#endif

#endif
